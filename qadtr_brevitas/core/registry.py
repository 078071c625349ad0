"""Names to plug-ins, without importing them: one line here (or an entry point) per plug-in."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qadtr_brevitas.core.errors import PluginError, UsageError, suggest

ENTRY_POINT_PREFIX = "qadtr_brevitas."


@dataclass(frozen=True)
class Registry:
    """Plug-ins of one kind: name -> ("package.module:Class", one-line description).

    Third-party packages add theirs through an entry point in the group `qadtr_brevitas.<kind>`: in lower case, with `_`
    for a space.

    Args:
        kind: what one of them is called.
        contract: "package.module:Class" of the abstract class that each derives from.
        builtin: the plug-ins of this package.
        prefixes: plug-ins that a name PREFIX/ROOT stands for, which other libraries use, with ROOT as `root`.
        declined: names that other tools have, and why there is no such plug-in and what to take instead.
    """

    kind: str
    contract: str
    builtin: Mapping[str, tuple[str, str]]
    prefixes: Mapping[str, str] = field(default_factory=dict[str, str])
    declined: Mapping[str, str] = field(default_factory=dict[str, str])

    def entries(self) -> dict[str, tuple[str, str]]:
        """Return every known plug-in, built-in ones first; an entry point cannot replace a built-in one."""
        return {**_external(self.kind), **self.builtin}

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names that match a shell pattern, sorted."""
        return sorted(name for name in self.entries() if fnmatch(name, pattern))

    def divide(self, name: str) -> tuple[str, dict[str, str]]:
        """Return the name of a plug-in and the settings that stand for a name PREFIX/ROOT; others as they are."""
        prefix, slash, root = name.partition("/")
        if not slash or prefix.lower() not in self.prefixes:
            return name, {}
        return self.prefixes[prefix.lower()], {"root": root} if root else {}

    def describe(self, name: str) -> str:
        """Return the one-line description of a plug-in."""
        return self._entry(name)[1]

    def load(self, name: str) -> Any:
        """Import and return the plug-in class.

        Raises:
            UsageError: the name is unknown (the nearest right one is offered).
            PluginError: the plug-in cannot be imported, or does not fulfill the contract of its kind.
        """
        target = self._entry(name)[0]
        try:
            found = resolve(target)
        # A third-party module may raise anything when it is imported.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(f"{self.kind} {name!r} cannot be loaded from {target} ({reason})") from error
        check_contract(found, resolve(self.contract), what=f"{self.kind} {name!r} ({target})")
        return found

    def load_all(self) -> dict[str, Any]:
        """Return every plug-in that can be loaded, by name; broken ones are left out."""
        found: dict[str, Any] = {}
        for name in self.names():
            with suppress(PluginError):
                found[name] = self.load(name)
        return found

    def make(self, value: object) -> Any:
        """Return a plug-in from itself, its name, or its name and keys as in a recipe.

        Raises:
            UsageError: the name is unknown, a key or value is not possible, or an object is of another kind.
            PluginError: as in `load`.
        """
        if isinstance(value, resolve(self.contract)):
            return value
        fields = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(f"{self.kind} {value!r} has no name: choose from {', '.join(self.names())}")
        plugin = self.load(name)
        try:
            return plugin(**fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.kind} {name!r} cannot be made of {fields}: {error}") from error

    def name_of(self, plugin: type) -> str | None:
        """Return the name that a plug-in class is registered under, or None."""
        for name, (target, _) in self.entries().items():
            # Only classes of that name are imported.
            if target.rpartition(":")[2] == plugin.__qualname__ and self._is_loaded_from(name, plugin):
                return name
        return None

    def _is_loaded_from(self, name: str, plugin: type) -> bool:
        try:
            return self.load(name) is plugin
        except PluginError:
            # Another plug-in, whose class has the same name, is broken.
            return False

    def _entry(self, name: str) -> tuple[str, str]:
        entries = self.entries()
        if name not in entries and name in self.declined:
            raise UsageError(f"there is no {self.kind} {name!r}: {self.declined[name]}")
        if name not in entries:
            raise UsageError(f"unknown {self.kind} {name!r}: {suggest(name, entries)}")
        return entries[name]


def check_contract(plugin: Any, contract: type, *, what: str) -> None:
    """Check that a plug-in is a class, or an object, of its contract with everything defined that it declares.

    A base class may declare an ability with the keys that it needs, as `required_keys`.

    Args:
        plugin: a class that derives from the contract, or a finished object of it.
        contract: the abstract class.
        what: how errors call the plug-in.

    Raises:
        PluginError: it does not derive from the contract, or lacks a method or a required key.
    """
    cls = plugin if isinstance(plugin, type) else type(plugin)
    name = f"{contract.__module__}.{contract.__qualname__}"
    if not issubclass(cls, contract):
        raise PluginError(f"{what} is not derived from {name}: make that the base class of {cls.__name__}")
    missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    if missing:
        raise PluginError(f"{what} does not define {', '.join(sorted(missing))}: see {name} for what each has to do")
    for ability in cls.__mro__:
        required: tuple[str, ...] = vars(ability).get("required_keys", ())
        if lacking := sorted(set(required) - vars(cls).get("__dataclass_fields__", {}).keys()):
            raise PluginError(f"{what} is a {ability.__name__} but has no key {', '.join(lacking)}: add it as a field")


def resolve(target: str) -> Any:
    """Import and return what "package.module:Class" names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


@cache
def _external(kind: str) -> dict[str, tuple[str, str]]:
    found = entry_points(group=ENTRY_POINT_PREFIX + kind.lower().replace(" ", "_"))
    return {point.name: (point.value, f"from {point.dist.name if point.dist else 'a plug-in'}") for point in found}


ATTACKS = Registry(
    "attack",
    "qadtr_brevitas.attacks.base:Attack",
    {
        "a-qapa": ("qadtr_brevitas.attacks.a_qapa:AQapa", "patches made inside the quantized network (QADT-R, eq. 1)"),
        "adaptive-patch": (
            "qadtr_brevitas.evaluation.adaptive_attack:AdaptivePatch",
            "per-image patch against --defend: where the masks fail",
        ),
        "autoattack": ("qadtr_brevitas.attacks.autoattack:AutoAttack", "four pixel attacks (Croce & Hein 2020)"),
        "dpr": ("qadtr_brevitas.attacks.dpr:Dpr", "universal patch of searched shape and texture (Chen et al. 2022)"),
        "fgsm": ("qadtr_brevitas.attacks.pixel:Fgsm", "pixel attack of one step (Goodfellow et al. 2015)"),
        "gap": ("qadtr_brevitas.attacks.gap:Gap", "universal patch under turns and scales (Brown et al. 2017)"),
        "lavan": ("qadtr_brevitas.attacks.lavan:Lavan", "universal or per-image patch (Karmon et al. 2018)"),
        "location-patch": ("qadtr_brevitas.attacks.location_patch:LocationPatch", "per-image patch that moves (PBAT)"),
        "mi-fgsm": ("qadtr_brevitas.attacks.pixel:MiFgsm", "pixel attack with momentum (Dong et al. 2018)"),
        "patch-auto": ("qadtr_brevitas.attacks.patch_auto:PatchAuto", "per-image patch, ensemble without parameters"),
        "pgd": ("qadtr_brevitas.attacks.pixel:Pgd", "pixel attack of many steps (Madry et al. 2018)"),
        "random-patch": ("qadtr_brevitas.attacks.random_patch:RandomPatch", "a patch of uniform noise: the baseline"),
        "sparse-rs": ("qadtr_brevitas.attacks.sparse_rs:SparseRs", "per-image patch, black box (Croce et al. 2022)"),
    },
)

DATASETS = Registry(
    "dataset",
    "qadtr_brevitas.data.base:Dataset",
    {
        "cifar10": ("qadtr_brevitas.data.image_folder:Cifar10", "CIFAR-10 as image folder or tar, 32x32, 10 classes"),
        "digits": ("qadtr_brevitas.data.digits:Digits", "UCI handwritten digits drawn in color, 32x32, embedded"),
        "gtsrb": ("qadtr_brevitas.data.gtsrb:Gtsrb", "GTSRB traffic signs, as published or as tar, 43 classes"),
        "hfds": (
            "qadtr_brevitas.data.hugging_face:HuggingFace",
            "a data set of Hugging Face: a name of the Hub or a folder",
        ),
        "image-folder": (
            "qadtr_brevitas.data.image_folder:ImageFolder",
            "ROOT/{train,test}/<class>/*.<image>, or ROOT/<class>/*.<image>",
        ),
        "shards": ("qadtr_brevitas.data.shards:ShardFolder", "tars of pictures and classes, as webdataset writes them"),
        "shapes": ("qadtr_brevitas.data.shapes:Shapes", "procedural colored shapes, any size and number"),
    },
    # The names of timm's dataset factory.
    prefixes={"hfds": "hfds", "wds": "shards"},
)

SCHEDULES = Registry(
    "schedule",
    "qadtr_brevitas.training.schedules:Schedule",
    {
        "curriculum": ("qadtr_brevitas.training.schedules:Curriculum", "precisions enter one after another (TriQDef)"),
        "cycle": ("qadtr_brevitas.training.schedules:Cycle", "each precision for some epochs in turn"),
        "fixed": ("qadtr_brevitas.training.schedules:Fixed", "one precision throughout (standard QAT)"),
        "sandwich": ("qadtr_brevitas.training.schedules:Sandwich", "highest, random and lowest precision each step"),
        "uniform": ("qadtr_brevitas.training.schedules:Uniform", "one precision a step, equally likely (DBWT, eq. 2)"),
        "weighted": ("qadtr_brevitas.training.schedules:Weighted", "one precision a step, with given weights"),
    },
)

OBJECTIVES = Registry(
    "objective",
    "qadtr_brevitas.training.objectives:Objective",
    {
        "cross-entropy": (
            "qadtr_brevitas.training.objectives:CrossEntropy",
            "cross-entropy with label smoothing, and the regularizers of the recipe",
        ),
        "triqdef": (
            "qadtr_brevitas.training.triqdef:TriQDef",
            "features and input gradients unlike at two precisions (TriQDef)",
        ),
    },
)

GRADIENT_RULES = Registry(
    "gradient rule",
    "qadtr_brevitas.training.gradient_rules:GradientRule",
    {
        "gir": ("qadtr_brevitas.training.gir:Gir", "gradient-inconsistent regularization (QADT-R, eq. 4 and 5)"),
    },
)

REGULARIZERS = Registry(
    "regularizer",
    "qadtr_brevitas.training.regularizers:Regularizer",
    {
        "distillation": ("qadtr_brevitas.training.regularizers:Distillation", "match the logits of a float teacher"),
        "weight-distribution": (
            "qadtr_brevitas.training.weight_distribution:WeightDistribution",
            "weights that spread evenly: kurtosis and skewness (EQ-Net)",
        ),
    },
)

ANALYSES = Registry(
    "analysis",
    "qadtr_brevitas.reproduce.analyses.base:Analysis",
    {
        "features": (
            "qadtr_brevitas.reproduce.analyses.features:Features",
            "feature maps, clean and patched (Figure 3)",
        ),
        "gradients": (
            "qadtr_brevitas.reproduce.analyses.gradients:Gradients",
            "gradients at each precision compared (Figure 4)",
        ),
        "pixel": (
            "qadtr_brevitas.reproduce.analyses.pixel:Pixel",
            "accuracy against eps under pixel attacks (Figure 1)",
        ),
        "sensitivity": (
            "qadtr_brevitas.reproduce.analyses.sensitivity:SensitivityAnalysis",
            "layers that cost most at each bit-width; bit-widths per layer for a budget",
        ),
        "size": ("qadtr_brevitas.reproduce.analyses.size:Size", "ASR by patch size (Table 21)"),
        "spatial": (
            "qadtr_brevitas.reproduce.analyses.spatial:Spatial",
            "ASR of patches shifted and rotated (Table 20)",
        ),
    },
)

FORMATS = Registry(
    "format",
    "qadtr_brevitas.exporting.formats:Format",
    {
        "finn": ("qadtr_brevitas.exporting.finn:FINN", "a folder to build with FINN"),
        "hls4ml": ("qadtr_brevitas.exporting.hls4ml:HLS4ML", "a folder to build with hls4ml"),
        "integers": (
            "qadtr_brevitas.exporting.integer_file:INTEGERS",
            "packed integers and their operations, for own hardware and C",
        ),
        "ort": ("qadtr_brevitas.exporting.onnx_files:ORT", "ONNX that onnxruntime runs in integers, fast at 8 bit"),
        "qcdq": ("qadtr_brevitas.exporting.onnx_files:QCDQ", "standard ONNX for onnxruntime, up to 8 bit"),
        "qonnx": ("qadtr_brevitas.exporting.onnx_files:QONNX", "arbitrary bit-widths, as Brevitas writes them"),
    },
)

QUANTIZERS = Registry(
    "quantizer",
    "qadtr_brevitas.quant.quantizer:Quantizer",
    {
        "log2": ("qadtr_brevitas.quant.log2:Log2", "the threshold divided by powers of two"),
        "power-of-two": ("qadtr_brevitas.quant.uniform:PowerOfTwo", "multiples of a step that is a power of two"),
        "twin": ("qadtr_brevitas.quant.twin:Twin", "finer steps below 0 than above, for outputs of GELUs (PTQ4ViT)"),
        "uniform": ("qadtr_brevitas.quant.uniform:Uniform", "multiples of a learned step (LSQ)"),
    },
)

TARGETS = Registry(
    "target",
    "qadtr_brevitas.quant.targets:Target",
    {
        "finn": ("qadtr_brevitas.quant.targets:FINN", "AMD's FINN: dataflow accelerators on FPGAs"),
        "hls4ml": ("qadtr_brevitas.quant.targets:HLS4ML", "hls4ml: fixed-point networks by high-level synthesis"),
        "ort": ("qadtr_brevitas.quant.targets:ORT", "onnxruntime: sums in integers too, fast at 8 bit"),
    },
)

RANGE_METHODS = Registry(
    "range method",
    "qadtr_brevitas.quant.range_methods:RangeMethod",
    {
        "minmax": ("qadtr_brevitas.quant.range_methods:MinMax", "the largest magnitude: clips nothing"),
        "mse": ("qadtr_brevitas.quant.range_methods:Mse", "the least squared quantization error per bit-width"),
        "percentile": ("qadtr_brevitas.quant.range_methods:Percentile", "a percentile of the magnitudes"),
    },
)

PTQ_METHODS = Registry(
    "PTQ method",
    "qadtr_brevitas.quant.ptq:PtqMethod",
    {
        "adaround": (
            "qadtr_brevitas.quant.adaround:AdaRound",
            "rounding up or down learned layer by layer (Nagel et al. 2020)",
        ),
        "bias-correction": (
            "qadtr_brevitas.quant.bias_correction:BiasCorrection",
            "mean outputs of layers as in the float network (Nagel et al. 2019)",
        ),
        "brecq": (
            "qadtr_brevitas.quant.brecq:Brecq",
            "rounding up or down, and ranges of activations, learned block by block (BRECQ); drop=0.5 is QDrop",
        ),
        "coordinate-descent": (
            "qadtr_brevitas.quant.coordinate_descent:CoordinateDescent",
            "each weight at its best level given all others (QuantEase, CDQuant)",
        ),
        "equalize": (
            "qadtr_brevitas.quant.equalize:Equalize",
            "similar ranges of channels, before the ranges are set (Nagel et al. 2019, SmoothQuant)",
        ),
        "gpfq": ("qadtr_brevitas.quant.brevitas_ptq:Gpfq", "greedy path following, by Brevitas"),
        "gptq": ("qadtr_brevitas.quant.gptq:Gptq", "later weights make up for rounding errors (Frantar et al. 2022)"),
        "magr": (
            "qadtr_brevitas.quant.magr:MagR",
            "smaller largest weights at nearly the same outputs, before gptq (Zhang et al. 2024)",
        ),
        "qronos": (
            "qadtr_brevitas.quant.brevitas_ptq:Qronos",
            "past and future errors, by Brevitas (Zhang et al. 2025)",
        ),
    },
    declined={
        "channel-splitting": (
            "duplicated channels change the shapes that all precisions share, so that 32 bit would not be the float "
            "network; take 'equalize', which evens out the ranges of channels, or 'magr', which makes outliers smaller"
        ),
    },
)

REGISTRIES = {
    "analyses": ANALYSES,
    "attacks": ATTACKS,
    "datasets": DATASETS,
    "schedules": SCHEDULES,
    "objectives": OBJECTIVES,
    "gradient-rules": GRADIENT_RULES,
    "formats": FORMATS,
    "ptq-methods": PTQ_METHODS,
    "quantizers": QUANTIZERS,
    "range-methods": RANGE_METHODS,
    "regularizers": REGULARIZERS,
    "targets": TARGETS,
}
