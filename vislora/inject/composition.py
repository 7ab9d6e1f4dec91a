"""The contract of a composition: how the adapters of a stack act together, and running the denoiser by it.

Plainly stacked adapters act all at once: their changes are added up. A composition lets some of them act, on some
layers, in each run of the denoiser, and may have it run several times in a step and mix what it predicts. Text encoders
run before the steps: there the changes are added up whatever the composition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vislora.errors import ConfigError, nearest
from vislora.inject.parts import LayerAdapter
from vislora.registry import COMPOSITIONS

if TYPE_CHECKING:
    from vislora.inject.moment import Moment

SUM = None
"""All adapters act at once, which needs no composition."""
OnLayers = Callable[[str], Mapping[str, LayerAdapter]]
"""Returns path -> the adapter of this name on that layer."""


@dataclass(frozen=True)
class Run:
    """One run of the denoiser.

    share: what its prediction counts. acting: name -> the paths where the adapter acts, None: everywhere.
    """

    share: float
    acting: Mapping[str, frozenset[str] | None]

    def gate(self, name: str, path: str) -> float:
        """Return 1 where the adapter `name` acts on the layer at `path`, else 0."""
        if name not in self.acting:
            return 0.0
        paths = self.acting[name]
        return float(paths is None or path in paths)


class Composition(Protocol):
    """A way for adapters to act together. A dataclass: its fields are its settings."""

    def runs(self, names: Sequence[str], step: int, last: int, on_layers: OnLayers) -> list[Run]:
        """Return the runs of one step; their shares add up to 1.

        names: of the active adapters, sorted. step: counts from 0 up to `last`. Raises `ConfigError` for adapters that
        cannot be composed so.
        """
        ...


def make_composition(method: str, settings: Mapping[str, Any]) -> Composition | None:
    """Return the composition of this name; None for `sum`. Raises `ConfigError` for an unknown name or setting."""
    if method not in COMPOSITIONS:
        raise ConfigError(f"unknown composition '{method}'{nearest(method, COMPOSITIONS)}; known: {known()}")
    kind = COMPOSITIONS[method]
    names = [field.name for field in fields(kind) if field.init] if kind else []
    odd = [name for name in settings if name not in names]
    if odd:
        shown = ", ".join(names) or "none"
        raise ConfigError(f"composition '{method}' has no setting '{odd[0]}'{nearest(odd[0], names)}; it has: {shown}")
    lacking = (
        [field.name for field in fields(kind) if _is_required(field) and field.name not in settings] if kind else []
    )
    if lacking:
        raise ConfigError(f"composition '{method}' needs: {', '.join(lacking)}")
    made: Composition | None = kind(**settings) if kind else None
    return made


def require_shares(shares: Mapping[str, float]) -> None:
    """Raise `ConfigError` for a share that is no number above 0."""
    for name, share in shares.items():
        if not 0.0 < share < float("inf"):
            raise ConfigError(f"shares: '{name}' has {share!r}: give a number above 0")


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def known() -> str:
    """Return the names of all compositions."""
    return ", ".join(COMPOSITIONS)


def mixed(model: nn.Module, moment: Moment, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Run `model` as often as the step still asks for, and return `out`, its first output, with the mean prediction."""
    if len(moment.runs) < 2:
        return out
    first, *rest = moment.runs
    prediction = _prediction(out)
    total = first.share * prediction.to(torch.float32)
    for run in rest:
        moment.enter(run)
        total += run.share * _prediction(model.forward(*args, **kwargs)).to(torch.float32)
    return _with_prediction(out, total.to(prediction.dtype))


def _prediction(out: Any) -> Tensor:
    found = out if isinstance(out, Tensor) else out[0]
    assert isinstance(found, Tensor)
    return found


def _with_prediction(out: Any, prediction: Tensor) -> Any:
    if isinstance(out, Tensor):
        return prediction
    if isinstance(out, tuple):
        return (prediction, *out[1:])
    out.sample = prediction
    return out
