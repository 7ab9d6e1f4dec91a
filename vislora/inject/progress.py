"""How far a pipeline's own loop over the timesteps is: 0 at the first step of its schedule, 1 at the last.

The scheduler tells: by the index that it counts, at the first step of a run by the timestep that the model is given.
Image to image with strength 0.6 begins at progress 0.4, because it leaves the first steps of the schedule out.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vislora.errors import ConfigError

NEAR = 0.02
"""How far a timestep may be from one of the schedule, relative to its range: half precision rounds it."""


@dataclass
class Loop:
    """The pipeline whose loop calls a denoiser, held weakly: it is the pipeline that holds the model."""

    _pipeline: Any = None
    _schedule: tuple[Any, list[float]] = field(default=(None, []))

    @staticmethod
    def of(pipeline: Any) -> Loop:
        """Return the loop of `pipeline`."""
        return Loop(weakref.ref(pipeline))

    @property
    def pipeline(self) -> Any:
        """Return the pipeline, None when it is gone."""
        return self._pipeline() if self._pipeline is not None else None

    def schedule(self) -> list[float]:
        """Return the timesteps of the run, read from the device once."""
        timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(timesteps, Tensor) or not timesteps.numel():
            return []
        if self._schedule[0] is not timesteps:
            self._schedule = timesteps, timesteps.double().flatten().tolist()
        return self._schedule[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model is in no pipeline."""
        return {"_pipeline": None, "_schedule": (None, [])}


def position_of(loop: Loop | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Return the step that a denoiser is called for, from 0, and the last one. Raises `ConfigError` if nothing tells.

    The progress is their quotient.
    """
    schedule = loop.schedule() if loop is not None else []
    if loop is None or not schedule:
        raise ConfigError(
            "a strength or composition depends on the steps, and no scheduler tells them: set it on the pipeline that "
            "runs the steps, not on its denoiser, or have it not depend on them"
        )
    scheduler = loop.pipeline.scheduler
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        index = _nearest(_timestep(args, kwargs), schedule, scheduler)
    last = schedule.index(schedule[-1])  # a scheduler of second order has every timestep twice
    step = schedule.index(schedule[min(int(index), len(schedule) - 1)])
    return _distinct(schedule, step), _distinct(schedule, last)


def _distinct(schedule: list[float], index: int) -> int:
    """Return how many different timesteps come before `index`."""
    return len(set(schedule[:index]))


def _timestep(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    found = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if isinstance(found, Tensor):
        found = found.flatten()[0].item()
    if not isinstance(found, (int, float)):
        raise ConfigError("a strength depends on the steps, and the denoiser is given no timestep")
    return float(found)


def _nearest(timestep: float, schedule: list[float], scheduler: Any) -> int:
    """Return the index of `timestep`, which some pipelines scale to [0, 1] or turn round."""
    length = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
    readings = (timestep, timestep * length, length - timestep * length, length - timestep)
    misses = [[abs(reading - place) for place in schedule] for reading in readings]
    best = min(misses, key=min)
    if min(best) > NEAR * max(map(abs, schedule)):
        raise ConfigError(
            f"a strength depends on the steps, and timestep {timestep:g} is none of the scheduler's; give the strength "
            "with the pipeline that runs, or one without steps"
        )
    return best.index(min(best))
