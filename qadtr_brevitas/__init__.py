"""Train, attack and deploy quantized networks that resist adversarial patches (QADT-R on Brevitas)."""

__version__ = "0.1.0"
