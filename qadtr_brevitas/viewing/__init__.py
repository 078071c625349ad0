"""A page in the browser to look at one model: where a patch lies, at which precision, and what the model then sees."""

from qadtr_brevitas.viewing.scene import Scene as Scene
from qadtr_brevitas.viewing.server import ViewServer as ViewServer
