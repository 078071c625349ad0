"""`qadtr-brevitas view MODEL_DIR`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qadtr_brevitas.cli.common import device_option, emit, examples, load_split, output_options, say, seed_option
from qadtr_brevitas.cli.option_values import patch_size_option
from qadtr_brevitas.cli.start import check_data, check_models, load_libraries
from qadtr_brevitas.pipeline.directories import Kind, what_is

if TYPE_CHECKING:
    from qadtr_brevitas.core.patch_size import PatchSize
    from qadtr_brevitas.viewing import Scene
    from qadtr_brevitas.viewing.subject import Subject


@click.command(
    "view",
    epilog=examples(
        "qadtr-brevitas view runs/qadtr",
        "qadtr-brevitas view runs/report",
        "qadtr-brevitas view runs/qadtr --patches sticker.png --patch-size 12",
        "qadtr-brevitas view models/resnet18 --data image-folder:photos --port 8000",
    ),
)
@click.argument("place", type=click.Path(path_type=Path), metavar="MODEL_DIR|REPORT")
@click.option(
    "--patches",
    "-p",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Patch file, picture or folder; repeatable.  [default: MODEL_DIR/patches or those of REPORT, else noise]",
)
@patch_size_option
@click.option("--data", help="Data set as NAME[:ROOT].  [default: that of the model or report]")
@click.option("--images", type=click.IntRange(min=1), default=24, show_default=True, help="Test images to choose from.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port.  [default: a free one]")
@click.option("--open", "open_", is_flag=True, help="Open the page in the browser of this machine.")
@device_option
@seed_option()
@output_options
def command(
    place: Path,
    patches: tuple[Path, ...],
    patch_sizes: tuple[PatchSize, ...] | None,
    data: str | None,
    images: int,
    port: int,
    open_: bool,
    device: str,
    seed: int,
) -> None:
    """Look at a model, or those of a report, in the browser: drag a patch over an image and switch the bit-width.

    The page shows the three most likely classes, the gradient that an attack follows, and what each mask of a defense
    by double masking sees. It runs on this machine only and loads nothing from others; Ctrl-C ends it.
    """
    if what_is(place) is not Kind.REPORT:
        check_models([place])
    check_data(data)
    load_libraries()
    from qadtr_brevitas.viewing import ViewServer
    from qadtr_brevitas.viewing.subject import find_subject

    subject = find_subject(place, patches=patches, sizes=patch_sizes or (), data=data)
    scenes = _scenes(subject, images=images, device=device, seed=seed)
    with ViewServer(scenes, port=port) as server:
        emit({"address": server.address}, server.address)
        say("open this address in a browser on this machine; Ctrl-C ends it")
        if open_:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")


def _scenes(subject: Subject, *, images: int, device: str, seed: int) -> list[Scene]:
    from qadtr_brevitas.config.slots import slot_name
    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.evaluation.entries import load_models, load_patches
    from qadtr_brevitas.pipeline.datasets import find_dataset
    from qadtr_brevitas.viewing import Scene

    where = resolve_device(device)
    models = load_models(subject.models, device=where)
    subject.check(models)
    dataset = find_dataset(subject.models, subject.data, report=say)
    split = load_split(dataset, "test", limit=images, seed=seed)
    found = load_patches(subject.patches, sizes=subject.sizes) if subject.patches else []
    for loaded in models:
        loaded.check_data(split, data=slot_name(dataset))
    return [Scene(loaded, split, found, device=where, seed=seed) for loaded in models]
