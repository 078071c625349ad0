"""`python -m qadtr_brevitas`, which is also how torchrun starts the command line."""

import sys

from qadtr_brevitas.cli.main import main

sys.exit(main())
