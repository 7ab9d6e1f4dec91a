"""The accelerator of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vislora.config.train import TrainConfig
from vislora.errors import ConfigError, missing_extra
from vislora.jobs.devices import pick_device, pick_precision
from vislora.jobs.run_folder import RunFolder


@contextmanager
def accelerated(config: TrainConfig, folder: RunFolder) -> Iterator[Accelerator]:
    """Give the accelerator, and leave none of its global state behind: a process may train again with another."""
    processes = 1
    try:
        accelerator = _accelerator(config, folder)
        processes = accelerator.num_processes
        try:
            yield accelerator
        finally:
            accelerator.end_training()
    finally:
        if processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator(config: TrainConfig, folder: RunFolder) -> Accelerator:
    device = pick_device(config.device)
    precision = pick_precision(config.loop.mixed_precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("loop.mixed_precision: fp16 needs a GPU; use no or bf16 on a CPU")
    trackers = "tensorboard" if config.loop.tensorboard else None
    if trackers:
        _require_tensorboard()
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=config.loop.gradient_accumulation,
        cpu=device.type == "cpu",
        log_with=trackers,
        project_dir=folder.root,
    )


def _require_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise missing_extra("tensorboard", "tensorboard", "loop.tensorboard") from None
