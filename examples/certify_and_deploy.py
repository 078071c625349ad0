"""Prove which predictions no patch of a size can change, and write the network as a file for onnxruntime.

A certificate is of the prediction under masks (PatchCleanser), which `qb.defend` gives. Few predictions of this network
are proved: one that is trained on masked images (`+masked`) is certified far better.
"""

from pathlib import Path

import torch
from digits_network import digits_network

import qadtr_brevitas as qb
from qadtr_brevitas.data.digits import Digits


def main(
    folder: str = "certify_and_deploy", steps: int = 300, images: int = 40, masks: int = 4
) -> qb.CertificationResult:
    # For onnxruntime's integers, sums are quantized too.
    model = qb.convert(digits_network(steps=steps), precisions=[32, 8], target="ort")
    qb.calibrate(model, Digits().load("train"))
    test = Digits().load("test")
    result = qb.certify(model, test, patch=4, precisions=[8], masks=masks, images=images)
    print(result)
    pixels, labels = test.batch(torch.arange(4))
    answer = qb.defend(model, 8, patch=4, masks=masks)(pixels)
    print("defended classes", answer.classes.tolist(), "of", labels.tolist(), "proved", answer.certified.tolist())
    qb.export(model, Path(folder), precision=8, format="ort", loader=test, images=images, overwrite=True)
    print("wrote", *sorted(path.name for path in Path(folder).iterdir()))
    return result


if __name__ == "__main__":
    main()
