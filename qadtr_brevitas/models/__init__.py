"""Networks for 32x32 images, registered with timm: importing this package makes `timm.create_model` know them."""

from qadtr_brevitas.models.cifar_resnet import CifarResNet as CifarResNet
from qadtr_brevitas.models.cifar_vgg import CifarVgg as CifarVgg
