"""What one training run holds, how it is put together, and what of it a checkpoint keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vislora.config.train import TrainConfig
from vislora.data.scan import dataset_hash
from vislora.diffusion import Timesteps
from vislora.files import content_hash
from vislora.inject.trained import MAGNITUDE
from vislora.jobs.adapter_files import Trained
from vislora.jobs.datasets import Prepared
from vislora.jobs.fresh import Learned
from vislora.jobs.plan import Plan
from vislora.jobs.run_folder import RunFolder, require_same_contents, settings_of
from vislora.models.base import Family
from vislora.models.resting import Resting
from vislora.training.average import Average
from vislora.training.loss import DenoisingLoss, LossOptions
from vislora.training.optim import ParameterGroup, make_optimizer
from vislora.training.validation import Measured


@dataclass
class Run:
    """Everything that one run holds. `average`: of its steps' adapters, if that is what it is to give."""

    plan: Plan
    folder: RunFolder
    family: Family
    data: Prepared
    learned: Learned
    accelerator: Accelerator
    module: DenoisingLoss
    optimizer: torch.optim.Optimizer
    about: Trained
    resting: Resting
    average: Average | None
    step: int = 0
    measured: list[Measured] = field(default_factory=list)

    @property
    def config(self) -> TrainConfig:
        """The resolved settings."""
        return self.plan.config

    def adapter(self, step: int | None = None) -> Path:
        """Return where the adapter goes, or where it is as it was after `step`."""
        return self.folder.adapter(self.config.format, step)

    def due(self, every: int) -> bool:
        """Say whether something that is done at the start, after so many steps and at the end is due; 0: never."""
        return bool(every) and (self.step % every == 0 or self.step == self.plan.steps)

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """Have the adapters as they would be saved now: the average, where there is one."""
        if self.average is None:
            yield
            return
        with self.average.in_place():
            yield


def assemble(
    plan: Plan,
    folder: RunFolder,
    family: Family,
    data: Prepared,
    learned: Learned,
    accelerator: Accelerator,
    about: Trained,
    resting: Resting,
) -> Run:
    """Put a run together, with what is learned as it is when it is fresh."""
    config = plan.config
    module = DenoisingLoss(family, learned.adapters, loss_options(plan), learned.words)
    optimizer = make_optimizer(config.optimizer.name, list(_groups(plan, learned)), config.optimizer.weight_decay)
    module, optimizer = accelerator.prepare(module, optimizer)
    average = Average(module.parameters(), config.loop.ema) if config.loop.ema else None
    return Run(plan, folder, family, data, learned, accelerator, module, optimizer, about, resting, average)


def _groups(plan: Plan, learned: Learned) -> Iterator[ParameterGroup]:
    """Yield what shares a rate, and decays or not; with LoRA+ what starts at zero has a higher one."""
    ratio = plan.config.optimizer.lora_plus_ratio
    for name, parts in learned.adapters.items():
        rate = plan.learning_rate if name == "denoiser" else plan.text_learning_rate
        ups = {id(parameter) for parameter in parts.ups()}
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {(rate, True): []}  # first: its rate is what is shown
        for path, slot, parameter in parts.by_layer():
            own = parts.trained[path].learning_rate or rate
            key = own * (ratio if id(parameter) in ups else 1.0), slot != MAGNITUDE
            groups.setdefault(key, []).append(parameter)
        for (peak, decays), parameters in groups.items():
            yield ParameterGroup(parameters, peak, decays)
    if learned.words is not None:
        yield ParameterGroup(learned.words.parameters(), plan.word_learning_rate, decays=False)


def loss_options(plan: Plan) -> LossOptions:
    """Return how the settings want the loss."""
    loop, prior, reach = plan.config.loop, plan.config.prior, plan.config.slider.reach
    timesteps = Timesteps(loop.timesteps, plan.timestep_shift)
    return LossOptions(loop.min_snr_gamma, loop.noise_offset, prior.weight, prior.share, timesteps, reach)


def state_of(job: Run) -> dict[str, Any]:
    """Return what a checkpoint holds, for `training.checkpoints`."""
    return {
        "step": job.step,
        "settings": settings_of(job.config),
        "contents": _contents(job),
        "sampler": job.data.sampler.state(),
        "adapters": job.accelerator.unwrap_model(job.module).state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "average": [] if job.average is None else job.average.tensors,
        "measured": [list(one) for one in job.measured],
    }


def restore(job: Run, state: Mapping[str, Any]) -> None:
    """Go on from what a checkpoint holds. Raises `ConfigError` for another base or other images."""
    require_same_contents(state["contents"], _contents(job), job.folder)
    job.accelerator.unwrap_model(job.module).load_state_dict(state["adapters"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.data.sampler.restore(state["sampler"])
    job.step = int(state["step"])
    if job.average is not None:
        job.average.restore(state["average"])
    job.measured = [Measured(*one) for one in state.get("measured", ())]  # older checkpoints have none


def _contents(job: Run) -> dict[str, str]:
    """Return name -> hash of all that a step reads beside the settings."""
    data = job.config.data
    examples = [*job.data.examples, *job.data.held_out.examples]
    folder = data.folder or job.folder.pictures
    images = {_within(example.path, folder): dataset_hash([example]) for example in examples}
    sources = [*job.data.sources, *job.data.held_out.sources]
    beside = {f"source {_within(source.path, data.sources)}": source.sha256 for source in sources}
    beside |= {f"mask {_within(mask.path, data.masks)}": mask.sha256 for mask in job.data.masks}
    prior = job.config.prior.regularization
    kept = [view.example for view in job.data.dataset.prior_views] if prior else []
    begin = job.config.adapter.begin
    beside |= {} if begin is None else {f"the adapter {begin}": content_hash(begin)}
    beside |= {f"prior {_within(example.path, prior)}": dataset_hash([example]) for example in kept}
    return {"the base model": job.about.base_hash, **images, **beside}


def _within(path: Path, folder: Path | None) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
