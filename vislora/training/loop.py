"""The Accelerate loop. It yields a record after every optimizer step and knows no model family, file or screen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from vislora.errors import VisloraError
from vislora.training.loss import DenoisingLoss
from vislora.training.optim import rate_factor, set_rate


@dataclass(frozen=True)
class LoopOptions:
    """`steps` optimizer steps of `accumulation` forward passes each; the rest as in `OptimizerConfig`."""

    steps: int
    accumulation: int
    schedule: str
    warmup_steps: int
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step done. `step` counts from 1; `loss` is the mean over its forward passes."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    images_per_second: float


def fit(
    module: DenoisingLoss,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Mapping[str, Any]],
    accelerator: Accelerator,
    options: LoopOptions,
    start: int = 0,
) -> Iterator[StepRecord]:
    """Train from step `start` to `options.steps`; yield after each step, when the state is whole.

    Every random draw of a step depends on the seed, the step and the process alone: a resumed run is the same run.
    `module` and `optimizer` are as `accelerator.prepare` returned them.
    Raises `VisloraError` when the loss is no longer finite.
    """
    for step in range(start, options.steps):
        began, images, total = time.perf_counter(), 0, torch.zeros((), device=accelerator.device)
        rate = set_rate(optimizer, rate_factor(step, options.steps, options.schedule, options.warmup_steps))
        generator = _generator(options.seed, step, accelerator.process_index)
        norm = 0.0
        for _ in range(options.accumulation):
            batch = next(batches)
            with accelerator.accumulate(module):
                loss = module(batch, generator)
                accelerator.backward(loss)
                norm = _clipped(accelerator, module, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total += loss.detach() / options.accumulation
            images += len(batch["latents"])
        mean = accelerator.reduce(total, reduction="mean").item()
        _require_finite(mean, step + 1)
        speed = images * accelerator.num_processes / (time.perf_counter() - began)
        yield StepRecord(step + 1, mean, rate, norm, speed)


def _clipped(accelerator: Accelerator, module: DenoisingLoss, limit: float) -> float:
    """Clip the gradients when this pass ends a step; return their norm before, else 0."""
    if not accelerator.sync_gradients:
        return 0.0
    return float(accelerator.clip_grad_norm_(module.parameters(), limit))


def _generator(seed: int, step: int, process: int) -> torch.Generator:
    """Return the step's own source of noise and timesteps; seed the global one too, which dropouts draw from."""
    mixed = (seed * 1_000_003 + step) * 1_009 + process
    torch.manual_seed(mixed % 2**63)
    return torch.Generator().manual_seed(mixed % 2**63)


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise VisloraError(
            f"the loss is {loss} at step {step}: lower optimizer.learning_rate, or set loop.mixed_precision to no or "
            "bf16, and start anew with --overwrite; the checkpoints written before are intact"
        )
