"""Networks for 32x32 images, registered with timm: importing this package makes `timm.create_model` know them."""

from qadtr_brevitas.models.cifar import CifarResNet as CifarResNet
from qadtr_brevitas.models.cifar import CifarVgg as CifarVgg
from qadtr_brevitas.models.mlperf_tiny import TinyResNet as TinyResNet
