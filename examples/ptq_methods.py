"""Compare how ranges are calibrated without training (PTQ), with and without bias correction, at each bit-width."""

import copy

from digits_network import digits_network

import qadtr_brevitas as qb
from qadtr_brevitas.data.digits import Digits

METHODS = ("minmax", "mse", {"name": "percentile", "percentile": 99.9})
PRECISIONS = [8, 4, 3, 2]


def main(steps: int = 300, samples: int = 256, images: int | None = None) -> dict[str, dict[str, float | None]]:
    net = digits_network(steps=steps)
    train, test = Digits().load("train", limit=samples), Digits().load("test")
    found: dict[str, dict[str, float | None]] = {}
    print(f"{'accuracy (%) at':32}", *(f"{bits:>5}" for bits in PRECISIONS))
    for method in METHODS:
        for weights in ([], ["bias-correction"]):
            model = qb.convert(copy.deepcopy(net), precisions=[32, *PRECISIONS])
            qb.calibrate(model, train, method=method, weights=weights)
            rates = qb.evaluate(model, test, precisions=PRECISIONS, images=images).clean_accuracy
            name = f"{method if isinstance(method, str) else method['name']} {' '.join(weights)}"
            found[name.strip()] = {bits: rate.value for bits, rate in rates.items()}
            print(f"{name:32}", *(f"{100 * (rates[str(bits)].value or 0):5.1f}" for bits in PRECISIONS))
    return found


if __name__ == "__main__":
    main()
