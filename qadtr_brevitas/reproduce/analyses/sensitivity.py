"""Which layers cost most at which bit-widths, and the bit-widths per layer that a budget buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Annotated

import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.core.layer_bits import MixedPrecision
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import MIN_BITS, Precision
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report.plots import COLORS, new_figure, save_figure, tidy
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.quant.budget import Budget, Option, choose_bits
from qadtr_brevitas.quant.layers import switchable_layers
from qadtr_brevitas.quant.sensitivity import Sensitivity, sensitivities, uniform_bits
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings
from qadtr_brevitas.reproduce.analyses.document import Picture, Record

_PICTURE, LAYERS_FILE = "sensitivity.png", "layers.json"
_NOTE = (
    "Mean KL divergence of the classes' probabilities from those of the float network, in thousandths of a nat, with "
    "that layer alone at the bit-width and everything else in float. What keeps 8 bit or more is the same at fewer."
)


@plugin
class SensitivityAnalysis(Analysis):
    """Change of the logits with one layer quantized; with a budget, the bit-widths per layer with the least sum of it.

    The bit-widths are those of the model's precisions of one bit-width, as 4, not w4a8. With `budget`, layers.json has
    the mixed precision that was chosen, which `convert MODEL --layers layers.json` adds to a model.
    """

    images: Annotated[int, Field(ge=1, description="training images that are looked at")] = 256
    budget: Annotated[
        str | None,
        Field(
            description="the most that the mixed precision may cost: bytes of weights and statistics (0.1MB), or "
            "bit-operations for an image (2.5Gbop); null: choose nothing"
        ),
    ] = None
    activations: Annotated[
        int | None, Field(ge=2, le=16, description="bits of activations at the mixed precision; null: the model's most")
    ] = None
    name: Annotated[str, Field(description="name of the mixed precision")] = "budget"

    def run(self, context: AnalysisContext) -> Findings:
        """Measure each model, draw sensitivity.png, and write layers.json where there is a budget."""
        budget = None if self.budget is None else Budget.parse(self.budget)
        if budget is not None and len(context.models) > 1:
            raise UsageError("a budget is for one model: give one, or leave out budget")
        Precision.mixed(self.name)
        train = context.data.train()
        images = train.balanced(min(self.images, len(train)), seed=context.seed)
        batches = [
            images.batch(part, device=context.device)[0] for part in torch.arange(len(images)).split(context.batch_size)
        ]
        records: list[Record] = []
        tables: list[Table] = []
        pictures: list[Picture] = []
        for loaded in context.models:
            found = sensitivities(loaded.model, batches, progress=context.progress)  # pyright: ignore
            records += _records(loaded.name, found, len(images))
            tables.append(_table(loaded.name, found))
            file = _PICTURE if len(context.models) == 1 else f"{loaded.name}-{_PICTURE}"
            _draw(found, context.output / file)
            pictures.append(Picture(file=file, caption=f"KL divergence of {loaded.name} with one layer quantized."))
            if budget is not None:
                choice = choose(loaded.model, found, budget, activations=self.activations, name=self.name)  # pyright: ignore
                write_json(
                    context.output / LAYERS_FILE,
                    {self.name: {pattern: bits.to_json() for pattern, bits in choice.mixed.patterns.items()}},
                )
                records += _choice_records(loaded, choice)
                tables.append(_choice_table(loaded, choice, budget))
        return Findings(title="Layers that cost most", records=records, tables=tables, pictures=pictures)


@dataclass(frozen=True)
class Choice:
    """A mixed precision within a budget.

    Args:
        mixed: the mixed precision.
        cost: what it costs, bytes or bit-operations.
        error: sum of the divergences of its weights, in nats.
        uniform: cost and error at each of the model's precisions with equal bit-widths of weights.
    """

    mixed: MixedPrecision
    cost: int
    error: float
    uniform: Mapping[int, tuple[int, float]]


def choose(
    model: SwitchableModel, found: Sequence[Sensitivity], budget: Budget, *, activations: int | None, name: str
) -> Choice:
    """Return the bit-widths of weights per layer with the least sum of divergences within a budget.

    Args:
        model: the switchable model that was measured.
        found: its sensitivities.
        budget: of bytes, counted as the sizes of a conversion are, or of bit-operations: the multiply-accumulates of
            each layer times its bits of weights and of activations.
        activations: bits of all activations; None for the most of the model's precisions.
        name: of the mixed precision.

    Raises:
        UsageError: the budget is less than the least possible, which is named.
    """
    widths = uniform_bits(model)
    most, act = widths[0], activations or widths[0]
    layers = switchable_layers(model.net)
    macs = {layer.name: layer.quantized_macs for layer in model.report.layers}
    options: dict[str, list[Option]] = {}
    for one in found:
        if one.kind == "weights" and one.layer in layers:
            least = layers[one.layer].weight_quant.quantizer.min_bits
            options[one.layer] = [
                Option(bits, _cost(one, max(bits, least), act, macs, budget), one.kl[bits])
                for bits in dict.fromkeys(max(bits, least) for bits in widths)
                if bits in one.kl
            ]
    options = {layer: choices for layer, choices in options.items() if choices}

    def spent(bits: Mapping[str, int]) -> int:
        return sum(next(o.cost for o in options[layer] if o.bits == chosen) for layer, chosen in bits.items())

    def uniform(width: int) -> dict[str, int]:
        return {
            layer: min((o.bits for o in choices if o.bits >= width), default=choices[0].bits)
            for layer, choices in options.items()
        }

    # All that the choice does not change: statistics, biases, thresholds, weights that the network computes.
    fixed = model.report.sizes[str(Precision(most, most))] - spent(uniform(most)) if budget.unit == "B" else 0
    chosen = choose_bits(options, int(budget.amount) - fixed)
    if chosen is None:
        smallest = fixed + sum(min(option.cost for option in choices) for choices in options.values())
        fewer = f", or convert with a precision of fewer bits, as {widths[-1] - 1}" if widths[-1] > MIN_BITS else ""
        raise UsageError(
            f"nothing fits into {budget.write(budget.amount)}: with {widths[-1]} bit for all weights that may have so "
            f"few, the network takes {smallest} {budget.unit}; give budget={smallest}{budget.unit} or more{fewer}"
        )
    patterns = {"*": {"weight": most, "activation": act}, **{layer: {"weight": bits} for layer, bits in chosen.items()}}

    def error(bits: Mapping[str, int]) -> float:
        return sum(next(o.error for o in options[layer] if o.bits == chosen) for layer, chosen in bits.items())

    return Choice(
        MixedPrecision.make(name, patterns),
        fixed + spent(chosen),
        error(chosen),
        {width: (fixed + spent(uniform(width)), error(uniform(width))) for width in widths},
    )


def _cost(one: Sensitivity, bits: int, act: int, macs: Mapping[str, int], budget: Budget) -> int:
    return one.values * bits // 8 if budget.unit == "B" else macs[one.layer] * bits * act


def _records(model: str, found: Sequence[Sensitivity], images: int) -> list[Record]:
    return [
        Record(
            model=model,
            precision=str(bits),
            what=what,
            value=value,
            n=images,
            facets={"layer": one.layer, "quantized": one.kind},
        )
        for one in found
        for what, values in (("kl", one.kl), ("mse of logits", one.mse))
        for bits, value in values.items()
    ]


def _choice_records(loaded: LoadedModel, choice: Choice) -> list[Record]:
    facts = {"cost": float(choice.cost), "sum of kl": choice.error}
    return [
        Record(model=loaded.name, precision=str(choice.mixed.precision), what=what, value=value)
        for what, value in facts.items()
    ]


def _table(model: str, found: Sequence[Sensitivity]) -> Table:
    widths = list(found[0].kl)
    rows = [
        (one.layer, one.kind, *(f"{1e3 * one.kl.get(bits, nan):.3g}" for bits in widths))
        for one in sorted(found, key=lambda one: -one.kl[widths[-1]])
    ]
    header = ("layer", "quantized", *(f"{bits} bit" for bits in widths))
    return Table(f"Layers of {model} that cost most", header, tuple(rows), (_NOTE,), labels=2)


def _choice_table(loaded: LoadedModel, choice: Choice, budget: Budget) -> Table:
    rows = [(f"{bits} bit", budget.write(cost), f"{1e3 * error:.3g}") for bits, (cost, error) in choice.uniform.items()]
    rows.append((str(choice.mixed.precision), budget.write(choice.cost), f"{1e3 * choice.error:.3g}"))
    by_bits: dict[int, list[str]] = {}
    for layer, bits in choice.mixed.patterns.items():
        if layer != "*" and bits.weight is not None:
            by_bits.setdefault(bits.weight, []).append(layer)
    notes = [f"{bits} bit: {', '.join(layers)}." for bits, layers in sorted(by_bits.items(), reverse=True)]
    add = f"Add it to a model with `qadtr-brevitas convert MODEL --layers {LAYERS_FILE}`, which calibrates it."
    header = ("weights", "cost", "sum of KL (1e-3 nats)")
    return Table(f"Bit-widths for {budget.write(budget.amount)}", header, tuple(rows), (*notes, add))


def _draw(found: Sequence[Sensitivity], path: Path) -> None:
    figure = new_figure(width=max(5.4, 0.22 * len(found)), height=4.4)
    axes = figure.subplots()
    places = range(len(found))
    for number, bits in enumerate(found[0].kl):
        values = [one.kl[bits] or nan for one in found]
        axes.plot(places, values, marker="o", markersize=3, color=COLORS[number % len(COLORS)], label=f"{bits} bit")
    axes.set_yscale("log")
    labels = [one.layer + (" (activations)" if one.kind == "activations" else "") for one in found]
    axes.set_xticks(places, labels, rotation=90, fontsize=6)
    axes.set_ylabel("KL divergence (nats)")
    tidy(axes)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    save_figure(figure, path)
