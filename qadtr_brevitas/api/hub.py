"""`push` and `from_pretrained`: models on the Hugging Face Hub, with a model card made of what was measured."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from qadtr_brevitas.auditing.headline import headline
from qadtr_brevitas.auditing.store import read_audits
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.evaluation.report import read_report
from qadtr_brevitas.models.python_functions import is_function_name
from qadtr_brevitas.pipeline.checkpoint import load_model, read_info
from qadtr_brevitas.pipeline.directories import (
    CONFIG_FILE,
    EVALUATION_FOLDER,
    REPORT_FILE,
    WEIGHTS_FILE,
    recipe_of_model,
    resolve_model_dir,
)
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.quant.model_info import ModelInfo

CARD_FILE = "README.md"
_FRONT_MATTER = """---
library_name: qadtr-brevitas
pipeline_tag: image-classification
tags: [quantization, brevitas, adversarial-robustness, adversarial-patch]
---"""


def push(model_dir: str | Path, repo: str, *, report: str | Path | None = None, private: bool = False) -> str:
    """Upload a model directory with a model card.

    The token is that of huggingface_hub: of `hf auth login`, or of the environment variable HF_TOKEN.

    Args:
        model_dir: a model or run directory.
        repo: OWNER/NAME on the hub; it is made if it is not there.
        report: folder of an evaluation whose figures the card shows; None for `evaluation` in the directory, if it is
            there.
        private: whether a new repository is private.

    Returns:
        The address of the model.

    Raises:
        CheckpointError: there is no model or report, or the hub cannot be reached or refuses.
        UsageError: the name of the repository is not possible.
    """
    folder = resolve_model_dir(model_dir)
    card = model_card(model_dir, repo, report=report)
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        with TemporaryDirectory() as place:
            file = Path(place) / CARD_FILE
            file.write_text(card, encoding="utf-8")
            for path in (folder / WEIGHTS_FILE, folder / CONFIG_FILE, file):
                api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a repository: give OWNER/NAME ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"cannot upload to {repo}: {error}; check the network, and that `hf auth login` or HF_TOKEN gives a token "
            "that may write"
        ) from error
    return str(address)


def from_pretrained(
    repo: str, *, revision: str | None = None, device: torch.device | str = "cpu", trust_code: bool = False
) -> SwitchableModel:
    """Download a model that `push` uploaded, and load it in eval mode.

    Args:
        repo: OWNER/NAME on the hub.
        revision: branch, tag or commit; None for the newest.
        device: where to.
        trust_code: whether a model whose network is made by a function of a Python package may import that package.

    Raises:
        CheckpointError: there is no such repository or no model in it, or the hub cannot be reached.
        UsageError: the name is not possible, or the network is a function of a package and `trust_code` is not set.
    """
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE])
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a repository: give OWNER/NAME ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"cannot download {repo}: {error}; check the name, the network and your token") from error
    name = read_info(folder).name
    if is_function_name(name) and not trust_code:
        raise UsageError(
            f"the network of {repo} is made by {name}, a function of a Python package, which would be imported: give "
            "trust_code=True if you trust that package"
        )
    return load_model(folder, device=device)[0]


def model_card(model_dir: str | Path, repo: str, *, report: str | Path | None = None) -> str:
    """Return the model card: what the model is, how well it resists, and the recipe that made it.

    Args:
        model_dir: a model or run directory.
        repo: OWNER/NAME, for the commands.
        report: as in `push`.

    Raises:
        CheckpointError: there is no model or report.
    """
    info, recipe = read_info(model_dir), recipe_of_model(Path(model_dir))
    parts = [_FRONT_MATTER, f"# {repo.rpartition('/')[2]}", _facts(info), _measured(Path(model_dir), report)]
    parts.append(f'```python\nimport qadtr_brevitas as qb\n\nmodel = qb.from_pretrained("{repo}")\n```')
    if recipe is not None:
        parts.append(f"## Recipe\n\n```yaml\n{recipe.read_text(encoding='utf-8').rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _facts(info: ModelInfo) -> str:
    classes = ", ".join(info.classes[:10]) + (", ..." if len(info.classes) > 10 else "")
    height, width = info.image_size
    return "\n".join(
        [
            f"A switchable quantized {info.name}, made by {info.source or 'qadtr-brevitas'}.",
            "",
            f"- Precisions: {', '.join(map(str, info.quant['precisions']))} bit, of one set of weights",
            f"- Images: RGB, {height}x{width}, values in [0, 1]; the model normalizes them by itself",
            f"- Classes ({info.num_classes}): {classes}",
        ]
    )


def _measured(model_dir: Path, report: str | Path | None) -> str:
    folder = model_dir / EVALUATION_FOLDER if report is None else Path(report)
    if report is None and not (folder / REPORT_FILE).is_file():
        return "## How well it resists\n\nNot measured. `qadtr-brevitas evaluate` does it."
    if not (folder / REPORT_FILE).is_file():
        raise UsageError(f"{folder} holds no {REPORT_FILE}: give a folder that `qadtr-brevitas evaluate` wrote")
    found = read_report(folder)
    first = headline(found, read_audits(folder, found))
    text = first.markdown().replace("## In short\n\n", "") if first else "The report holds no figures."
    return f"## How well it resists\n\n{text}"
