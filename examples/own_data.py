"""Fine-tune weights for other classes on a folder of pictures, photos/CLASS/*.png.

The folder has no test images: every fifth picture is kept for tests. The weights know ten classes and the folder has
three: the last layer is new. On the command line:
qadtr-brevitas train finetune data.dataset.root=photos model.pretrained=false model.checkpoint=digits.safetensors \
  model.name=cifar_resnet8
"""

from pathlib import Path

from digits_network import digits_network
from PIL import Image
from safetensors.torch import save_file

import qadtr_brevitas as qb
from qadtr_brevitas.data.digits import Digits
from qadtr_brevitas.data.image_folder import ImageFolder

CLASSES = ("zero", "one", "two")


def write_pictures(photos: Path, *, count: int) -> None:
    """Write a folder of pictures, as a camera would have filled it."""
    split = Digits(seed=1).load("train")
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        if label < len(CLASSES) and number < count:
            file = photos / CLASSES[label] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def main(folder: str = "own_data", steps: int = 300, epochs: int = 4, count: int = 1000) -> qb.EvaluationResult:
    photos, weights = Path(folder) / "photos", Path(folder) / "digits.safetensors"
    write_pictures(photos, count=count)
    save_file(digits_network(steps=steps).state_dict(), weights)
    settings = {
        "data.dataset.root": str(photos),
        "data.augment": "none",
        "model.name": "cifar_resnet8",
        "model.pretrained": False,
        "model.checkpoint": str(weights),
        "train.float_epochs": 1,
        "train.epochs": epochs,
    }
    run = qb.train("finetune", Path(folder) / "run", overrides=settings)
    test = ImageFolder(root=str(photos), holdout=5).load("test")
    result = qb.evaluate(run.path, test)
    print(result)
    return result


if __name__ == "__main__":
    main()
