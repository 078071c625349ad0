"""The sections of a recipe. Each key has a type, a range, a default and a description; no other keys exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from qadtr_brevitas.config.problems import located_error
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.layer_bits import LayerBitsField
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.core.plugin import PatchSizeField, PrecisionField
from qadtr_brevitas.core.precision import DEFAULT_BITS, parse_precisions
from qadtr_brevitas.core.registry import (
    ATTACKS,
    DATASETS,
    GRADIENT_RULES,
    OBJECTIVES,
    PTQ_METHODS,
    QUANTIZERS,
    RANGE_METHODS,
    REGULARIZERS,
    SCHEDULES,
    TARGETS,
)

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.base import Attack, TrainingAttack
    from qadtr_brevitas.data.base import Dataset
    from qadtr_brevitas.quant.ptq import PtqMethod
    from qadtr_brevitas.quant.quantizer import Quantizer
    from qadtr_brevitas.quant.range_methods import RangeMethod
    from qadtr_brevitas.training.gradient_rules import GradientRule
    from qadtr_brevitas.training.objectives import Objective
    from qadtr_brevitas.training.regularizers import Regularizer
    from qadtr_brevitas.training.schedules import Schedule

    AttackSlot: TypeAlias = Attack
    DatasetSlot: TypeAlias = Dataset
    GradientSlot: TypeAlias = GradientRule
    ObjectiveSlot: TypeAlias = Objective
    PtqMethodSlot: TypeAlias = PtqMethod
    QuantizerSlot: TypeAlias = Quantizer
    RangeMethodSlot: TypeAlias = RangeMethod
    RegularizerSlot: TypeAlias = Regularizer
    ScheduleSlot: TypeAlias = Schedule
    TrainingAttackSlot: TypeAlias = TrainingAttack
else:
    AttackSlot = Annotated[Any, Slot(ATTACKS)]
    DatasetSlot = Annotated[Any, Slot(DATASETS)]
    GradientSlot = Annotated[Any, Slot(GRADIENT_RULES)]
    ObjectiveSlot = Annotated[Any, Slot(OBJECTIVES)]
    PtqMethodSlot = Annotated[Any, Slot(PTQ_METHODS)]
    QuantizerSlot = Annotated[Any, Slot(QUANTIZERS)]
    RangeMethodSlot = Annotated[Any, Slot(RANGE_METHODS)]
    RegularizerSlot = Annotated[Any, Slot(REGULARIZERS)]
    ScheduleSlot = Annotated[Any, Slot(SCHEDULES, key="schedule")]
    TrainingAttackSlot = Annotated[
        Any,
        Slot(
            ATTACKS,
            contract="qadtr_brevitas.attacks.base:TrainingAttack",
            advice="it cannot be used in training: use it with `qadtr-brevitas attack` or `evaluate --attack`",
        ),
    ]


def _known_target(name: str) -> str:
    if name not in TARGETS.entries():
        raise ValueError(f"must be one of {', '.join(TARGETS.names())}, got {name!r}")
    return name


TargetName = Annotated[str, AfterValidator(_known_target)]


def _plugin(name: str) -> Any:
    """Return the name of a plug-in as the default of a slot; validation makes the plug-in."""
    return name


class RecipeSection(BaseModel):
    """A frozen mapping that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ModelSection(RecipeSection):
    """The float network that is converted."""

    name: str = Field(
        default="cifar_resnet20", min_length=1, description="any timm model name, or torchvision's where timm has none"
    )
    pretrained: bool = Field(default=False, description="let timm load its pretrained weights")
    checkpoint: str | None = Field(
        default=None, description="float weights to start from: .safetensors, .pth, or a run or model directory"
    )
    num_classes: int | None = Field(default=None, ge=2, description="classes; null: as many as the data set has")
    args: dict[str, Any] = Field(default={}, description="further arguments of timm.create_model")


class TransformSection(RecipeSection):
    """Random changes to each training image by timm's transforms, in this order; attacks come after them."""

    scale: tuple[float, float] | None = Field(
        default=(0.08, 1.0), description="share of a picture's area that a random crop keeps; null: no such crop"
    )
    ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="width to height of the crop")
    interpolation: Literal["bilinear", "bicubic", "random"] = Field(
        default="bicubic", description="how the crop is resized to the size of the images"
    )
    pad: int = Field(default=0, ge=0, description="crop after so many black pixels are added on each side")
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirror image")
    rand_augment: str | None = Field(default=None, description="timm's RandAugment, as rand-m9-mstd0.5-inc1")
    color_jitter: float = Field(
        default=0.0, ge=0, description="strength of random brightness, contrast, saturation; not beside rand_augment"
    )
    force_color_jitter: bool = Field(
        default=False, description="color jitter on top of rand_augment, which timm leaves out otherwise"
    )
    erase: float = Field(default=0.0, ge=0, le=1, description="probability that a rectangle is erased")
    erase_mode: Literal["const", "rand", "pixel"] = Field(
        default="pixel", description="fill it with the mean color, a random color, or random pixels"
    )
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup, with labels in shares; 0: none")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of CutMix, with labels in shares; 0: none")
    mix_probability: float = Field(default=1.0, ge=0, le=1, description="of a batch being mixed")
    cutmix_probability: float = Field(default=0.5, ge=0, le=1, description="of CutMix where mixup is on as well")

    @model_validator(mode="after")
    def _ranges_ascend(self) -> TransformSection:
        for name, pair, most in (("scale", self.scale, 1.0), ("ratio", self.ratio, float("inf"))):
            if pair is not None and not 0 < pair[0] <= pair[1] <= most:
                rule = f"must be two numbers above 0{' and at most 1' if most == 1 else ''}, the smaller one first"
                raise located_error([((name,), f"{rule}, got {list(pair)}")])
        return self

    @model_validator(mode="after")
    def _jitter_is_meant(self) -> TransformSection:
        # timm drops it without a word, so that published settings with both mean RandAugment alone.
        if self.rand_augment is not None and self.color_jitter and not self.force_color_jitter:
            rule = (
                f"{self.color_jitter:g} beside rand_augment={self.rand_augment}, where timm leaves color jitter out: "
                "set color_jitter to 0 to do as timm does, or force_color_jitter to true for both"
            )
            raise located_error([(("color_jitter",), rule)])
        return self

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


class DataSection(RecipeSection):
    """The images and their labels."""

    dataset: DatasetSlot = Field(default=_plugin("cifar10"), description="the data set")
    augment: Literal["none", "crop", "crop-flip"] = Field(
        default="crop-flip", description="changes to training images, where there is no transform"
    )
    transform: TransformSection | None = Field(
        default=None, description="timm's changes to training images, instead of augment; null: none"
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="processes that read streamed or transformed training images ahead; null: one per core, at most 8",
    )
    val_share: float = Field(default=0.0, ge=0, lt=1, description="share of training images held out to choose best/")
    train_limit: int | None = Field(default=None, ge=1, description="number of training images to use, class-balanced")
    test_limit: int | None = Field(default=None, ge=1, description="number of test images to use, class-balanced")


class CalibrationSection(RecipeSection):
    """How quantizer ranges are first set."""

    method: RangeMethodSlot = Field(default=_plugin("mse"), description="how a range is chosen")
    samples: int | None = Field(
        default=None, ge=16, description="training images looked at; null: 512, or all where there are fewer"
    )
    weights: tuple[PtqMethodSlot, ...] = Field(default=(), description="PTQ methods that run afterwards, in order")


class FeatureClipSection(RecipeSection):
    """Clip the L2 norm of each position's features, a defense against universal patches without training.

    Thresholds are those of calibration, at each precision by itself.
    """

    after: tuple[str, ...] = Field(min_length=1, description="modules whose outputs are clipped, as layer1")
    percentile: float = Field(default=90.0, gt=0, le=100, description="of the norms on the images of the calibration")


class QuantSection(RecipeSection):
    """Which layers are quantized, and to what."""

    precisions: tuple[PrecisionField, ...] = Field(
        default=parse_precisions(DEFAULT_BITS), min_length=1, description="the precisions the model can be switched to"
    )
    first_last: Literal["8bit", "same", "float"] = Field(
        default="8bit", description="first and last layer: at least 8 bit, same, float"
    )
    norm: Literal["statistics", "switchable"] = Field(
        default="statistics", description="per precision: norm statistics only, or a whole BatchNorm"
    )
    residual: Literal["8bit", "same"] = Field(
        default="8bit", description="residual streams: at least 8 bit, or as the rest"
    )
    narrow_range: bool = Field(default=True, description="symmetric weights; 2 bit is then ternary")
    activations: Literal["static", "dynamic"] = Field(
        default="static", description="activation ranges: calibrated and learned, or each image's own at run time"
    )
    attention_scales: Literal["tensor", "head"] = Field(
        default="tensor", description="ranges of what attention multiplies: one of a tensor, or one per head"
    )
    target: TargetName | None = Field(
        default=None, description="place quantizers so that this FPGA compiler accepts the export"
    )
    weight_quantizer: QuantizerSlot | None = Field(
        default=None, description="how weights become levels; null: the target's own, or uniform"
    )
    act_quantizer: QuantizerSlot | None = Field(
        default=None, description="how activations become levels; null: the target's own, or uniform"
    )
    layers: dict[str, dict[str, LayerBitsField]] = Field(
        default={},
        description="mixed precisions, mixed:NAME each: bit-widths by pattern of module names, "
        "{NAME: {'*': 4, 'layer4.*': {weight: 8}}}",
    )
    softmax_quantizer: QuantizerSlot | None = Field(
        default=None, description="that of attention probabilities, as log2 (FQ-ViT); null: act_quantizer"
    )
    gelu_quantizer: QuantizerSlot | None = Field(
        default=None, description="that of the outputs of GELUs, as twin (PTQ4ViT); null: act_quantizer"
    )
    feature_clip: FeatureClipSection | None = Field(
        default=None, description="clip the norms of features after some modules; null: nowhere"
    )
    calibration: CalibrationSection = Field(default_factory=CalibrationSection, description="first quantizer ranges")


class OptimizerSection(RecipeSection):
    """The optimizer, made by timm."""

    name: str = Field(default="sgd", min_length=1, description="any timm optimizer name")
    lr: float = Field(default=0.02, gt=0, description="highest learning rate, for the global batch")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum, or beta1 of Adam")
    weight_decay: float = Field(default=1e-4, ge=0, description="weight decay; none on norms, biases and thresholds")
    threshold_lr_scale: float = Field(
        default=1.0, ge=0, description="factor on the learning rate of quantizer thresholds"
    )
    threshold_rule: Literal["constant", "alrs"] = Field(
        default="constant",
        description="learning rate of thresholds: that of the weights, or adapted to each bit-width (ALRS, with SGD)",
    )

    @model_validator(mode="after")
    def _alrs_needs_gradients_as_they_are(self) -> OptimizerSection:
        # Optimizers that normalize gradients undo what ALRS takes from their size.
        if self.threshold_rule == "alrs" and self.name not in ("sgd", "nesterov", "momentum"):
            rule = f"alrs goes with sgd, nesterov or momentum, got the optimizer {self.name}: give constant"
            raise located_error([(("threshold_rule",), rule)])
        return self


class SchedulerSection(RecipeSection):
    """The learning rate over time; it changes with every optimizer step."""

    name: Literal["cosine", "poly", "step", "constant"] = Field(default="cosine", description="shape of the curve")
    warmup_epochs: float = Field(default=1, ge=0, description="epochs of linear warm-up, part of train.epochs")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end")
    decay_epochs: float = Field(default=30, gt=0, description="step only: epochs between two drops")
    decay_rate: float = Field(default=0.1, gt=0, le=1, description="step only: factor at each drop")


class MasksSection(RecipeSection):
    """Masks over training images, drawn from the sets that certification covers patches with.

    `random` draws masks evenly. `greedy` searches the mask of highest loss, then the second mask that makes it worst
    beside the first (Greedy Cutout, Saha et al. 2023), by forward passes at the precision of the step. One candidate is
    drawn for each image from each of `grid` x `grid` blocks of neighboring masks.
    """

    mode: Literal["random", "greedy"] = Field(default="random", description="how masks are chosen from their set")
    patches: tuple[PatchSizeField, ...] = Field(
        default=(PatchSize(5, 5),),
        min_length=1,
        description="sizes of patches to certify against, as 5 or 3x10; the masks of an image are for one of them",
    )
    per_side: int = Field(default=6, ge=2, description="masks along each side of an image, as in certification")
    fill: Literal["mean", "interpolate"] = Field(
        default="mean", description="what masks show, as in certification: the mean color, or pixels around them"
    )
    one: float = Field(default=0.3, ge=0, le=1, description="share of the images under one mask")
    two: float = Field(default=0.7, ge=0, le=1, description="share of the images under two masks")
    attacked: float = Field(
        default=1.0, ge=0, le=1, description="factor on both shares among attacked images; 0: these are never masked"
    )
    searched: float = Field(
        default=1.0, gt=0, le=1, description="greedy only: share of the masked images whose worst masks are searched"
    )
    grid: int = Field(default=3, ge=1, description="greedy only: candidates along each side of an image")

    @model_validator(mode="after")
    def _shares_leave_room(self) -> MasksSection:
        both = self.one + self.two
        # 0.1 + 0.2 + 0.7 is more than 1 in floating point.
        if both > 1 + 1e-9:
            rule = f"one and two must be at most 1 together, got {self.one:g} + {self.two:g} = {both:g}"
            raise located_error([((), rule)])
        if both == 0:
            raise located_error([((), "one and two must not both be 0: to train without masks give train.masks=null")])
        return self

    def search_passes(self, attacked: float) -> float:
        """Return the forward passes, without gradients, that the search takes for each image of a batch.

        Args:
            attacked: share of the batch that is attacked.
        """
        if self.mode == "random":
            return 0.0
        return (1 - attacked + attacked * self.attacked) * self.searched * self.grid**2 * (self.one + 2 * self.two)


class TrainSection(RecipeSection):
    """The training run. Precision schedule, attack, masks, objective, regularizers, gradient rule are independent."""

    epochs: int = Field(default=15, ge=1, description="epochs of quantized training")
    batch_size: int = Field(default=128, ge=1, description="images per step, over all processes")
    accumulate: int = Field(
        default=1, ge=1, description="compute a batch in so many parts and add their gradients, to save memory"
    )
    float_epochs: int = Field(default=0, ge=0, description="epochs at 32 bit before calibration, to train from scratch")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="the optimizer")
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection, description="the learning rate over time")
    precision: ScheduleSlot = Field(default=_plugin("uniform"), description="which precision each step trains")
    attack: TrainingAttackSlot | None = Field(default=None, description="adversarial images in the batches")
    masks: MasksSection | None = Field(default=None, description="masks over the images of quantized epochs")
    objective: ObjectiveSlot = Field(default=_plugin("cross-entropy"), description="what a quantized step minimizes")
    regularizers: tuple[RegularizerSlot, ...] = Field(default=(), description="losses added to the cross entropy")
    gradient: GradientSlot | None = Field(default=None, description="how gradients are changed before a step")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing of the cross entropy")
    update: Literal["mean", "each"] = Field(
        default="mean",
        description="of a step at several precisions: one update by their mean loss, or one after each precision",
    )
    clip_grad_norm: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    amp: Literal["no", "bf16", "fp16"] = Field(default="no", description="automatic mixed precision")
    compile: bool | Literal["quantizers"] = Field(
        default=False,
        description="run passes of training and attacks through torch.compile, after a wait per precision; quantizers: "
        "these alone, after one short wait (on GPUs they always are)",
    )
    validate_every: int = Field(default=1, ge=1, description="epochs between two validations")
    checkpoint_every: int = Field(default=200, ge=1, description="steps between two states to resume from")
    norm_batches: int = Field(default=0, ge=0, description="batches that recalibrate norms at the end; 0: keep them")

    @property
    def mask_search_cost(self) -> str | None:
        """What the search for worst masks costs, in words; None where there is none."""
        passes = self.masks.search_passes(self.attack.share if self.attack else 0.0) if self.masks else 0.0
        if not passes:
            return None
        return (
            f"the search for worst masks takes {passes:.1f} forward passes without gradients per training image "
            "(train.masks.searched and train.masks.grid change that)"
        )
