"""Convert a network for FINN, AMD's compiler of dataflow accelerators, and write the folder that it builds.

The file is compared with the network on test images. `make compilers` installs FINN, which estimates the FPGA's share:
qadtr-brevitas export MODEL_DIR -p 4 -f finn --estimate
"""

from pathlib import Path

from digits_network import digits_network

import qadtr_brevitas as qb
from qadtr_brevitas.data.digits import Digits


def main(folder: str = "finn_from_python", steps: int = 300, images: int = 20) -> Path:
    # FINN wants shared scales at sums and integers at the input, so the conversion has to know.
    model = qb.convert(digits_network(steps=steps), precisions=[32, 4], target="finn")
    qb.calibrate(model, Digits().load("train"))
    test = Digits().load("test")
    print(qb.evaluate(model, test, images=100))
    report = qb.export(model, folder, precision=4, format="finn", loader=test, images=images, overwrite=True)
    print(report.agreement)
    print("wrote", *sorted(path.name for path in Path(folder).iterdir()))
    return Path(folder)


if __name__ == "__main__":
    main()
