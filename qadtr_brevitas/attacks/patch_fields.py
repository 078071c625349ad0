"""What patch attacks share: the recipe keys of budget and search, and how a universal patch is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import model_validator

from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model, Progress
    from qadtr_brevitas.attacks.patch import Patch
    from qadtr_brevitas.attacks.universal import Candidate, Put, Task

_DEFAULT_SHARE = 1 / 16
_DEFAULT_LR = {"sgd": 1.0, "sign": 0.05, "adam": 0.1}
# Larger steps of Adam wipe a picture out before they make anything of it.
_LR_FROM_PICTURE = {**_DEFAULT_LR, "adam": 0.05}

Pixels = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PatchFields:
    """Budget, shape and place of a patch."""

    size: Annotated[
        Pixels | tuple[Pixels, Pixels] | None,
        Field(description="side or diameter in pixels, or [height, width] of a rectangle"),
    ] = None
    np: Annotated[
        float | None,
        Field(gt=0, le=1, description="budget as a share of the pixels; with neither size nor np, a sixteenth"),
    ] = None
    shape: Annotated[Literal["square", "rectangle", "disc"], Field(description="what the patch covers")] = "square"
    place: Annotated[
        Literal["random"] | tuple[Index, Index],
        Field(description="random, anew per image and step, or [row, column] of the top left pixel"),
    ] = "random"
    keep_out: Annotated[
        tuple[Index, Index, Pixels, Pixels] | None,
        Field(description="[row, column, height, width] of a box that random places leave free"),
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> PatchFields:
        if self.size is not None and self.np is not None:
            raise ValueError("size and np are two ways to give one budget: give only one of them")
        if self.shape == "rectangle" and not isinstance(self.size, tuple):
            raise ValueError("a rectangle needs size=[height, width]")
        if self.shape != "rectangle" and isinstance(self.size, tuple):
            raise ValueError(f"a {self.shape} needs a single size; for [height, width] give shape=rectangle")
        if self.place != "random" and self.keep_out is not None:
            raise ValueError("keep_out is for random places: give only one of place and keep_out")
        return self

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """The pixels the patch covers, boolean (h, w), for images of (H, W) pixels.

        Raises:
            UsageError: the patch does not fit on the image at its place, or beside the box to keep out of.
        """
        from qadtr_brevitas.attacks.geometry import corners_outside, fixed_corners
        from qadtr_brevitas.attacks.shapes import shape_mask, side_for_share

        size = self.size
        if size is None:
            size = side_for_share(self.np or _DEFAULT_SHARE, image_size, self.shape)
        mask = shape_mask(self.shape, size)
        corner = (0, 0) if self.place == "random" else self.place
        patch_size = mask.shape[0], mask.shape[1]
        fixed_corners(corner, 1, image_size, patch_size)
        if self.keep_out is not None:
            corners_outside(self.keep_out, image_size, patch_size)
        return mask

    def corners(
        self, count: int, image_size: tuple[int, int], patch_size: tuple[int, int], *, generator: torch.Generator
    ) -> Tensor:
        """Places (count, 2) by these settings, int64 row and column of the top left pixel, anew with every call."""
        from qadtr_brevitas.attacks.geometry import place_corners

        return place_corners(self.place, count, image_size, patch_size, generator=generator, keep_out=self.keep_out)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SearchFields(PatchFields):
    """How the texture of a universal patch is searched.

    A subclass may say how a texture gets on images (`put`), or search more than a texture (`search`).
    """

    attack: ClassVar[str]
    """Registered name."""

    target: Annotated[Index | None, Field(description="class to be seen instead; null: any wrong one")] = 0
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 300
    batch_size: Annotated[int, Field(ge=1, description="images per step")] = 64
    step_rule: Annotated[Literal["sgd", "sign", "adam"], Field(description="how the gradient is followed")] = "adam"
    lr: Annotated[
        float | None,
        Field(
            gt=0, description=f"step size at the start; null: by step rule, {_DEFAULT_LR}, adam 0.05 from init=image"
        ),
    ] = None
    cosine: Annotated[bool, Field(description="let the step size fall to zero along a cosine")] = True
    loss: Annotated[Literal["logits", "cross-entropy", "margin"], Field(description="what is descended")] = "logits"
    init: Annotated[
        Literal["image", "uniform", "gray"],
        Field(description="texture at the start; image: the best of 64 pictures of the target class, made as small"),
    ] = "image"
    restarts: Annotated[
        int,
        Field(
            ge=1, description="independent runs, of which the best is kept; of init=image every second one from noise"
        ),
    ] = 1
    check_every: Annotated[int, Field(ge=1, description="steps between held-out scores, for keeping the best")] = 50

    @property
    def step_size(self) -> float:
        """The step size at the start: `lr`, or what suits the step rule and where it begins."""
        return self.lr or (_LR_FROM_PICTURE if self.init == "image" else _DEFAULT_LR)[self.step_rule]

    def put(self, mask: Tensor) -> Put:
        """How a texture gets on images, given the pixels it covers: at a place of its own in every image."""
        from qadtr_brevitas.attacks.geometry import paste

        size = mask.shape[0], mask.shape[1]

        def at_places(texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
            image_size = images.shape[-2], images.shape[-1]
            corners = self.corners(len(images), image_size, size, generator=generator)
            return paste(images, texture, mask, corners)

        return at_places

    def search(self, task: Task, mask: Tensor) -> Candidate:
        """One search from one start, under the mask of these settings."""
        from qadtr_brevitas.attacks.universal import search_under_mask

        return search_under_mask(task, mask, self.put(mask))

    def fit(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        held_out: tuple[Tensor, Tensor],
        seed: int,
        progress: Progress | None = None,
    ) -> Patch:
        """Makes the patch. The model's parameters get no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, 3, H, W), uint8 or float in [0, 1], on the model's device.
            labels: (N,).
            held_out: images and labels on which the best texture is chosen; not those of the final score.
            seed: the same seed gives the same patch.
            progress: called after every step.

        Raises:
            UsageError: the patch does not fit on the images, or the model has no class `target`.
            DataError: no images to make it or to choose it on.
            TrainingError: the texture is no longer finite.
        """
        from qadtr_brevitas.attacks.universal import fit_universal

        return fit_universal(self, model, images, labels, held_out=held_out, seed=seed, progress=progress)
