"""`vislora train`: a folder of images in, an adapter file out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vislora import formats
from vislora.config.train import TrainConfig
from vislora.data.scan import dataset_hash
from vislora.diffusion import Timesteps
from vislora.errors import ConfigError, VisloraError, listed, missing_extra
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.names import FAMILY_NAMES
from vislora.formats.writing import unwritable
from vislora.inject.injection import AdapterSet, FreshOptions, eject, inject_fresh, summary
from vislora.inject.parts import Dropout
from vislora.inject.targets import Target, select
from vislora.jobs.adapter_files import Trained, adapter_file, modules_of
from vislora.jobs.datasets import Prepared, prepare_data
from vislora.jobs.devices import DTYPES, free_bytes, pick_device, pick_precision
from vislora.jobs.memory import Step, estimate, memory_notes
from vislora.jobs.plan import Plan, make_plan
from vislora.jobs.previews import preview
from vislora.jobs.priors import ask_base
from vislora.jobs.recipes import base_hash
from vislora.jobs.run_folder import (
    RunFolder,
    begin,
    open_folder,
    require_same,
    require_same_contents,
    settings_of,
)
from vislora.models.base import Family, load_family
from vislora.records import Done, Note, Progress, Record, result
from vislora.training.checkpoints import save_checkpoint
from vislora.training.interrupt import stop_on_signal
from vislora.training.loop import LoopOptions, StepRecord, fit
from vislora.training.loss import DenoisingLoss, LossOptions
from vislora.training.optim import ParameterGroup, make_optimizer

FRESH = "training"
"""What the adapter is called on the model while it trains."""


@dataclass
class Run:
    """Everything that one run holds."""

    plan: Plan
    folder: RunFolder
    family: Family
    data: Prepared
    adapters: dict[str, AdapterSet]
    accelerator: Accelerator
    module: DenoisingLoss
    optimizer: torch.optim.Optimizer
    about: Trained
    step: int = 0

    @property
    def config(self) -> TrainConfig:
        """The resolved settings."""
        return self.plan.config


@dataclass(frozen=True)
class TrainedAdapter:
    """What `train` returns. `step`: the last one done; `finished`: False when the run was stopped before its end."""

    path: Path
    step: int
    finished: bool


def train(**settings: Any) -> TrainedAdapter:
    """Train an adapter; `settings` are the fields of `TrainConfig`, sections as nested dicts."""
    return result(run(TrainConfig.of(settings)))


def run(config: TrainConfig) -> Iterator[Record]:
    """Train as `config` says; yields notes and progress, then the adapter.

    However it ends, the base is as before.
    """
    started = time.time()
    folder, state = open_folder(config)
    with _accelerated(config, folder) as accelerator:
        family = _load_base(config, accelerator)
        plan = make_plan(config, family.traits, accelerator.mixed_precision)
        if state is not None:
            require_same(plan.config, folder, state)
        data = yield from prepare_data(plan, family, folder)
        about = Trained(family, base_hash(config.base, config.base_parts), data.examples, data.buckets, started)
        chosen = _chosen(config, family)
        yield from _memory(plan, family, data, chosen, accelerator.device)
        with _injected(config, family, chosen) as adapters:
            _require_writable(adapters, plan, family)
            for line in summary(family.components, adapters):
                yield Note(line)
            job = _assemble(plan, folder, family, data, adapters, accelerator, about)
            if state is not None:
                _restore(job, state)
                yield Note(f"going on from step {job.step} of {plan.steps}")
            elif config.resume:
                yield Note(f"{folder.root} holds no checkpoint yet: starting at step 0")
            yield from ask_base(plan, data.dataset, accelerator.unwrap_model(job.module), accelerator)
            yield from _loop(job)


def _loop(job: Run) -> Generator[Record, None, None]:
    """Run the steps, with checkpoints and samples between them; always end with a checkpoint and the adapter file."""
    loop, sample = job.config.loop, job.config.sample
    if job.accelerator.is_main_process:
        begin(job.config, job.folder, job.step)
    if loop.tensorboard:
        # the steps after the checkpoint are done again: TensorBoard hides what an earlier run wrote of them
        job.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": job.step + 1}})
    if sample.every and job.step == 0:
        yield from _preview(job)
    began, first = time.perf_counter(), job.step
    with stop_on_signal() as stop:
        for record in _steps(job):
            job.step = record.step
            _log(job, record)
            yield _progress(record, job.plan.steps, began, first)
            if loop.save_every and job.step % loop.save_every == 0 and job.step < job.plan.steps:
                _checkpoint(job)
            if sample.every and (job.step % sample.every == 0 or job.step == job.plan.steps):
                yield from _preview(job)
            if stop.requested:
                break
    _checkpoint(job)
    yield from _finish(job)


def _steps(job: Run) -> Iterator[StepRecord]:
    config = job.config
    options = LoopOptions(
        steps=job.plan.steps,
        accumulation=config.loop.gradient_accumulation,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
    )
    batches = job.data.batches(job.accelerator.process_index, job.accelerator.num_processes)
    return fit(job.module, job.optimizer, batches, job.accelerator, options, job.step)


def _load_base(config: TrainConfig, accelerator: Accelerator) -> Family:
    device = accelerator.device
    dtype = DTYPES[pick_precision(config.loop.mixed_precision, device)]
    family = load_family(config.base or None, dtype, device, config.base_parts or None)
    if config.loop.gradient_checkpointing:
        family.components["denoiser"].enable_gradient_checkpointing()  # type: ignore[operator]
    # on a CPU convs are faster so
    family.components["denoiser"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return family


@contextmanager
def _accelerated(config: TrainConfig, folder: RunFolder) -> Iterator[Accelerator]:
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


@contextmanager
def _injected(
    config: TrainConfig, family: Family, chosen: Mapping[str, Mapping[str, Target]]
) -> Iterator[dict[str, AdapterSet]]:
    """Give fresh adapters on the denoiser and, when asked for, on every text encoder, with all the rest frozen.

    They are taken off at the end, and when one of the components could not have its adapter.
    """
    options = _fresh_options(config)
    adapters: dict[str, AdapterSet] = {}
    try:
        for name, layers in chosen.items():
            adapters[name] = inject_fresh(family.components[name], FRESH, layers, options)
        yield adapters
    finally:
        for name in adapters:
            eject(family.components[name], FRESH)


def _chosen(config: TrainConfig, family: Family) -> dict[str, dict[str, Target]]:
    """Return component -> path -> target of every layer that is trained."""
    adapter = config.adapter
    default = Target("", adapter.rank, adapter.alpha, adapter.algorithm)
    targets = [
        Target(
            item.pattern,
            adapter.rank if item.rank is None else item.rank,
            adapter.alpha if item.alpha is None else item.alpha,
            item.algorithm or adapter.algorithm,
        )
        for item in adapter.targets
    ]
    chosen = {"denoiser": select(family.components["denoiser"], targets, adapter.preset, default)}
    if adapter.text_encoders:
        for component in _text_encoders(family):
            chosen[component] = select(family.components[component], [], "attention-ff", default)
    return chosen


def _text_encoders(family: Family) -> list[str]:
    """Return those that adapter files of this family have a place for. Raises `ConfigError` when there is none."""
    named = FAMILY_NAMES[family.card.name].tables
    found = [component for component in family.components if component != "denoiser" and component in named]
    if not found:
        name = family.card.name
        raise ConfigError(f"adapter.text_encoders: no program reads adapters for the text encoder of '{name}'")
    return found


def _fresh_options(config: TrainConfig) -> FreshOptions:
    adapter = config.adapter
    return FreshOptions(
        tucker=adapter.tucker,
        init=adapter.init,
        rule="alpha/sqrt(r)" if adapter.rank_stabilized else "alpha/r",
        dropout=Dropout(adapter.dropout, adapter.rank_dropout, adapter.module_dropout),
        dora=adapter.dora,
        seed=config.seed,
    )


def _loss_options(config: TrainConfig) -> LossOptions:
    loop, prior = config.loop, config.prior
    timesteps = Timesteps(loop.timesteps, loop.timestep_shift)
    return LossOptions(loop.min_snr_gamma, loop.noise_offset, prior.weight, prior.share, timesteps)


def _memory(
    plan: Plan, family: Family, data: Prepared, chosen: Mapping[str, Mapping[str, Target]], device: torch.device
) -> Iterator[Note]:
    """Say what memory the run takes, and whether the device has it."""
    config = plan.config
    options = _fresh_options(config), _loss_options(config)
    try:
        found = estimate(family, Step(chosen, *options, data.largest_batch(), config.optimizer.name))
    except VisloraError:
        raise
    except Exception as error:  # nothing that a model does without its weights may keep it from training
        yield Note(f"memory: no estimate; this base cannot be run without its weights ({type(error).__name__})")
        return
    yield from memory_notes(found, free_bytes(device), config)


def _require_writable(adapters: dict[str, AdapterSet], plan: Plan, family: Family) -> None:
    """Raise `ConfigError` when `config.format` has no place for what is about to be trained."""
    form = plan.config.format
    losses = unwritable(
        AdapterFile(modules=modules_of(adapters, DTYPES[plan.config.save_precision]), family=family.card.name), form
    )
    if losses:
        raise ConfigError(listed(f"format: a {form} file cannot hold the adapter:", map(str, losses)))


def _assemble(
    plan: Plan,
    folder: RunFolder,
    family: Family,
    data: Prepared,
    adapters: dict[str, AdapterSet],
    accelerator: Accelerator,
    about: Trained,
) -> Run:
    config = plan.config
    groups = [
        ParameterGroup(parameters, plan.learning_rate if name == "denoiser" else plan.text_learning_rate, decays)
        for name, parts in adapters.items()
        for decays, parameters in ((True, parts.slots()), (False, parts.magnitudes()))
    ]
    module = DenoisingLoss(family, adapters, _loss_options(config))
    optimizer = make_optimizer(config.optimizer.name, groups, config.optimizer.weight_decay)
    module, optimizer = accelerator.prepare(module, optimizer)
    return Run(plan, folder, family, data, adapters, accelerator, module, optimizer, about)


def _restore(job: Run, state: Mapping[str, Any]) -> None:
    require_same_contents(state["contents"], _contents(job), job.folder)
    job.accelerator.unwrap_model(job.module).load_state_dict(state["adapters"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.data.sampler.restore(state["sampler"])
    job.step = int(state["step"])


def _contents(job: Run) -> dict[str, str]:
    """Return name -> hash of all that a step reads beside the settings."""
    data = job.config.data
    images = {_within(example.path, data.folder): dataset_hash([example]) for example in job.data.examples}
    sources = {f"source {_within(source.path, data.sources)}": source.sha256 for source in job.data.sources}
    return {"the base model": job.about.base_hash, **images, **sources}


def _within(path: Path, folder: Path | None) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _checkpoint(job: Run) -> None:
    if not job.accelerator.is_main_process:
        return
    state = {
        "step": job.step,
        "settings": settings_of(job.config),
        "contents": _contents(job),
        "sampler": job.data.sampler.state(),
        "adapters": job.accelerator.unwrap_model(job.module).state_dict(),
        "optimizer": job.optimizer.state_dict(),
    }
    save_checkpoint(job.folder.checkpoints, job.step, state, job.config.loop.keep_checkpoints)


def _preview(job: Run) -> Iterator[Note]:
    if job.accelerator.is_main_process:
        path = job.folder.samples / f"{job.step:06d}.png"
        captions = [example.caption for example in job.data.examples[:4]]
        sources = [source.path for source in job.data.sources[:4]]
        preview(job.family, job.module, job.plan, captions, sources, path)
        yield Note(f"samples: {path}")


def _finish(job: Run) -> Generator[Record, None, None]:
    """Save the adapter."""
    config, finished = job.config, job.step >= job.plan.steps
    path = job.folder.adapter(config.format, None if finished else job.step)
    if job.accelerator.is_main_process:
        formats.save(adapter_file(job.adapters, job.plan, job.about, job.folder.name, job.step), path, config.format)
    text = f"adapter: {path}"
    if not finished:
        text = f"stopped at step {job.step} of {job.plan.steps}; go on with --resume\n{text}"
    yield Done(TrainedAdapter(path, job.step, finished), text, 0 if finished else 130)


def _log(job: Run, record: StepRecord) -> None:
    if job.accelerator.is_main_process:
        with open(job.folder.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
    values = {"loss": record.loss, "learning_rate": record.learning_rate, "grad_norm": record.grad_norm}
    job.accelerator.log(values, step=record.step)


def _progress(record: StepRecord, steps: int, began: float, first: int) -> Progress:
    rate = (record.step - first) / (time.perf_counter() - began)
    fields = {"loss": f"{record.loss:.4f}", "lr": f"{record.learning_rate:.2e}", "steps/s": f"{rate:.2f}"}
    return Progress("training", record.step, steps, dict(fields))
