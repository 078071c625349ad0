"""`qadtr-brevitas push MODEL_DIR OWNER/NAME`."""

from __future__ import annotations

from pathlib import Path

import click

from qadtr_brevitas.cli.common import emit, examples, output_options, say
from qadtr_brevitas.cli.start import check_models, load_libraries
from qadtr_brevitas.core.extras import require


@click.command(
    "push",
    epilog=examples(
        "qadtr-brevitas push runs/qadtr me/resnet20-qadtr",
        "qadtr-brevitas push runs/qadtr me/resnet20-qadtr --report runs/report --private",
        "qadtr-brevitas push runs/qadtr me/resnet20-qadtr --dry-run",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Evaluation whose figures the card shows.  [default: MODEL_DIR/evaluation]",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Only print the model card; upload nothing.")
@output_options
def command(model_dir: Path, repo: str, report: Path | None, private: bool, dry_run: bool) -> None:
    """Upload a model to the Hugging Face Hub, with a model card made of what was measured.

    The card has the precisions, how well the model resists at each, its certificates and audit, and its recipe.
    In Python, qb.from_pretrained("OWNER/NAME") loads the model.
    """
    check_models([model_dir])
    require("huggingface_hub", extra=None, purpose="push")
    load_libraries()
    from qadtr_brevitas.api.hub import model_card, push

    if dry_run:
        card = model_card(model_dir, repo, report=report)
        return emit({"card": card}, card)
    address = push(model_dir, repo, report=report, private=private)
    emit({"address": address})
    say(f'wrote {address}; next, in Python: qb.from_pretrained("{repo}")')
