"""What strengths depend on while a model runs: whose image a row is, how far the run is, where a token lies.

Rows: the batch of a denoiser is the images of the call in their order, once or, with guidance in one pass, several
times: row r is of image r mod images. A layer with more rows than the model (frames, windows) has those of one row next
to each other. A text encoder may be given one row for all images of a prompt; their strengths must then agree there.
Places: see `places`. A layer that sees none, such as those of the text, has the largest value of a region. So a mask of
ones is no region, and a mask of zeros is strength 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.places import Grid, Places
from vislora.inject.progress import Loop, position_of
from vislora.inject.strength import Strength

if TYPE_CHECKING:
    from vislora.inject.composition import Composition, OnLayers, Run

OUTSIDE = (
    "strengths that differ by image, step or place are looked up outside of a graph; vislora.reserve needs no break"
)
PASSES = 3
"""The most copies of a batch in one forward that guidance makes: without a prompt, with it, and perturbed."""
Share = tuple[str, tuple[float, ...], int]
"""The part of an effect that is one adapter's: its name, its strengths on this layer, the number of channels."""


@dataclass
class Moment:
    """One forward of a model, as its layers see it.

    component, strengths: of the model's stack, by adapter; one strength, or one per image. varying: those of them that
    depend on the moment. rows: of the model's input. loop: what tells the progress. composition: how the adapters of a
    denoiser act together, None: all at once; on_layers: what it may look at; runs: of the denoiser in this step.
    """

    component: str = "denoiser"
    strengths: dict[str, tuple[Strength, ...]] = field(default_factory=dict)
    varying: dict[str, tuple[Strength, ...]] = field(default_factory=dict)
    loop: Loop | None = None
    rows: int | None = None
    position: tuple[int, int] = (0, 0)
    places: Places | None = None
    composition: Composition | None = None
    on_layers: OnLayers | None = None
    runs: list[Run] = field(default_factory=list)
    _run: Run | None = None
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _signature: Any = None

    @property
    def progress(self) -> float:
        """Return how far the run is, in [0, 1]."""
        step, last = self.position
        return step / last if last else 0.0

    @property
    def images(self) -> int:
        """Return the number of images that strengths were given for, 1 when they are the same for all."""
        return max((len(strengths) for strengths in self.varying.values()), default=1)

    @property
    def is_needed(self) -> bool:
        """Say whether a strength depends on the moment."""
        return bool(self.varying) or self.composition is not None

    def give(self, name: str, strengths: tuple[Strength, ...] | None) -> None:
        """Set the strengths of an adapter, or forget them."""
        self._made, self._signature = {}, None
        self.varying.pop(name, None)
        if strengths is None:
            del self.strengths[name]
            return
        self.strengths[name] = strengths
        if varies(strengths):
            self.varying[name] = strengths

    def begin(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Read what the model is called with. Raises a `VisloraError` for what the strengths do not fit."""
        named = [kwargs[name] for name in ("sample", "hidden_states") if name in kwargs]
        given = (*args, *named, *kwargs.values())
        first = next((item for item in given if isinstance(item, Tensor) and item.dim()), None)
        if first is None:
            raise AdapterMismatchError(f"{type(model).__name__} is called without a tensor: nothing tells its rows")
        self.rows = first.shape[0]
        varying = [strength for strengths in self.varying.values() for strength in strengths]
        if self._is_denoiser:
            self._require_rows(self.rows)
            regions = [strength.region for strength in varying if strength.region is not None]
            self.places = Places.of(model, first, args, kwargs) if regions else None
            for region in regions if self.places else ():
                region.require_shape(*self.places.sides)  # type: ignore[union-attr]
            if any(strength.steps is not None for strength in varying) or self.composition is not None:
                self.position = position_of(self.loop, args, kwargs)
        self.runs, self._run = self._composed(), None
        if self.runs:
            self.enter(self.runs[0])
        signature = self.rows, self.places, tuple((name, self._over(name)) for name in self.varying)
        if signature != self._signature:
            self._made, self._signature = {}, signature

    def enter(self, run: Run) -> None:
        """Have the adapters act as they do in this run of the denoiser."""
        self._run = run
        self._made = {}

    def _composed(self) -> list[Run]:
        """Return the runs of this step; none where all adapters act at once."""
        if self.composition is None or not self._is_denoiser:
            return []
        names = sorted(name for name, given in self.strengths.items() if any(one.value != 0.0 for one in given))
        if any(len(self.strengths[name]) > 1 for name in names):
            raise ConfigError("images with stacks of their own have no composition but 'sum': make them one by one")
        assert self.on_layers is not None
        return self.composition.runs(names, *self.position, self.on_layers) if names else []

    @torch.compiler.disable(reason=OUTSIDE)
    def factor(self, shares: Sequence[Share], out: Tensor, axis: int, path: str) -> Tensor:
        """Return what an effect on the layer at `path` is multiplied by, in the dtype and on the device of `out`.

        out: the layer's output, whose `axis` is its channels (-1, or 1 for a conv). The result broadcasts to an effect
        like `out` with as many channels as `shares` have together.
        """
        grid = self.places.grid(path, out, axis) if self.places else None
        rows = out.shape[0] if out.dim() > 1 else 1
        gates = tuple(self._run.gate(name, path) for name, _, _ in shares) if self._run else ()
        key = (tuple(shares), gates, rows, out.dim(), axis, grid, out.dtype, out.device)
        if key not in self._made:
            columns = [self._column(share, rows, out.dim(), axis, grid, path) for share in shares]
            columns = [column * gate for column, gate in zip(columns, gates, strict=True)] if gates else columns
            sizes = torch.broadcast_shapes(*(column.shape for column in columns))
            wide = [
                column.expand(*_with(sizes, axis, width)) for column, (_, _, width) in zip(columns, shares, strict=True)
            ]
            self._made[key] = torch.cat(wide, axis).to(out.device, out.dtype)
        return self._made[key]

    def values(self, name: str) -> list[float]:
        """Return value times steps of an adapter for each row of the model."""
        given = [one.value * over for one, over in zip(self.strengths[name], self._over(name), strict=True)]
        if len(given) == 1:
            return given * (self.rows or 1)
        self.require_agreement(name, torch.tensor(given).unbind(), name)
        return [given[image] for image in self.image_rows(self.rows or 1, name)]

    @torch.compiler.disable(reason=OUTSIDE)
    def image_rows(self, here: int, path: str) -> tuple[int, ...]:
        """Return the image of each of `here` rows of the layer at `path`. Raises `AdapterMismatchError`."""
        rows, images = self.rows or here, self.images
        if rows % images == 0:
            index = [row % images for row in range(rows)]
        elif images % rows == 0:
            index = [row * (images // rows) for row in range(rows)]
        else:
            raise AdapterMismatchError(self._counts(rows))
        if here % rows:
            raise AdapterMismatchError(
                f"layer '{path}' runs once for all {images} images ({here} rows of {rows}); give all images the same "
                f"strength there, such as layers={{'{path}': 0}}"
            )
        return tuple(image for image in index for _ in range(here // rows))

    @property
    def _is_denoiser(self) -> bool:
        return not self.component.startswith("te:")

    def _require_rows(self, rows: int) -> None:
        """Raise `ConfigError` unless `rows` are the images once, or as often as guidance repeats them."""
        passes, rest = divmod(rows, self.images)
        single = getattr(self.loop.pipeline if self.loop else None, "do_classifier_free_guidance", None) is False
        perturbed = getattr(self.loop.pipeline if self.loop else None, "do_perturbed_attention_guidance", False)
        if self.images > 1 and (rest or passes > (1 if single and not perturbed else PASSES)):
            raise ConfigError(self._counts(rows))

    def _counts(self, rows: int) -> str:
        return (
            f"strengths were given for {self.images} images, and {self.component} runs {rows} rows: give one strength "
            "per image that the call makes, in its order, or one for all"
        )

    def _over(self, name: str) -> tuple[float, ...]:
        """Return the factor of the steps for each strength of an adapter; a text encoder runs before the steps."""
        strengths = self.strengths[name]
        return tuple(strength.at(self.progress) if self._is_denoiser else 1.0 for strength in strengths)

    def _column(self, share: Share, rows: int, dim: int, axis: int, grid: Grid | None, path: str) -> Tensor:
        """Return the factor of one adapter with one channel: (rows or 1, places or 1, 1)."""
        name, on_layer, _ = share
        count = max(len(on_layer), len(self.strengths[name]))
        given = _each(self.strengths[name], count)
        values = [
            one * other for one, other in zip(_each(on_layer, count), _each(self._over(name), count), strict=True)
        ]
        found = [_cells(strength, value, grid, dim, axis) for strength, value in zip(given, values, strict=True)]
        cells = torch.broadcast_tensors(*found)
        if all(torch.equal(cell, cells[0]) for cell in cells):
            return cells[0][None]
        index = self.image_rows(rows, path)
        self.require_agreement(name, cells, path)
        return torch.stack([cells[image] for image in index])

    def require_agreement(self, name: str, cells: Sequence[Tensor], path: str) -> None:
        """Raise `ConfigError` when images that a text encoder runs as one row do not have one factor of `cells`."""
        together = max(1, len(cells) // (self.rows or len(cells)))
        for start in range(0, len(cells), together):
            group = cells[start : start + together]
            if not all(torch.equal(cell, group[0]) for cell in group):
                raise ConfigError(
                    f"'{name}' has several strengths for the images of one prompt, and {self.component} runs once per "
                    f"prompt ('{path}'): give the prompt once per image, or components={{'{self.component}': 0}}"
                )


def varies(strengths: Sequence[Strength]) -> bool:
    """Say whether these depend on the image, the step or the place."""
    return len(strengths) > 1 or not strengths[0].is_constant


def _each(given: Sequence[Any], count: int) -> list[Any]:
    return list(given) * count if len(given) == 1 else list(given)


def _cells(strength: Strength, value: float, grid: Grid | None, dim: int, axis: int) -> Tensor:
    """Return the factor of one image, without the axis of rows: its channels are one, its places all or one."""
    if strength.region is None or grid is None:
        largest = 1.0 if strength.region is None else strength.region.largest
        return torch.full([1] * (dim - 1), value * largest)
    height, width, before, after = grid
    mask = strength.region.sized(height, width) * value
    if axis != -1:
        return mask[None]
    others = torch.full((before + after,), value * strength.region.largest)
    return torch.cat([others[:before], mask.flatten(), others[before:]])[:, None]


def _with(sizes: torch.Size, axis: int, width: int) -> list[int]:
    found = list(sizes)
    found[axis] = width
    return found
