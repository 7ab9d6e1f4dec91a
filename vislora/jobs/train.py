"""`vislora train`: a folder of images in, an adapter file out."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vislora import formats
from vislora.config.train import TrainConfig
from vislora.data.scan import captions_of
from vislora.errors import VisloraError
from vislora.inject.trained import Begin, summary
from vislora.jobs.accelerated import accelerated
from vislora.jobs.adapter_files import Trained, adapter_file, require_writable
from vislora.jobs.curves import draw_losses
from vislora.jobs.datasets import Prepared, prepare_data
from vislora.jobs.devices import DTYPES, free_bytes, pick_precision
from vislora.jobs.dry_run import draw_images, outlook
from vislora.jobs.fresh import chosen_layers, fresh_options, learning
from vislora.jobs.held_out import told
from vislora.jobs.memory import Step, estimate, memory_notes
from vislora.jobs.plan import Plan, make_plan
from vislora.jobs.previews import preview
from vislora.jobs.priors import ask_base
from vislora.jobs.recipes import base_hash
from vislora.jobs.run_folder import RunFolder, begin, drop_adapters, open_folder, require_same
from vislora.jobs.run_state import Run, assemble, loss_options, restore, state_of
from vislora.models.base import Family, load_family
from vislora.models.resting import Resting, all_but_denoiser
from vislora.records import Done, Note, Progress, Record, result
from vislora.training.checkpoints import save_checkpoint
from vislora.training.interrupt import stop_on_signal
from vislora.training.loop import LoopOptions, StepRecord, fit
from vislora.training.validation import Measured, lowest, validation_loss


@dataclass(frozen=True)
class TrainedAdapter:
    """What `train` returns. `step`: the last one done; `finished`: False when the run was stopped before its end.

    Of a dry run, `path` is where the adapter would be.

    lowest: the adapter of the step with the lowest loss on the held-out images, if there are any.
    """

    path: Path
    step: int
    finished: bool
    lowest: Path | None = None


def train(**settings: Any) -> TrainedAdapter:
    """Train an adapter; `settings` are the fields of `TrainConfig`, sections as nested dicts."""
    return result(run(TrainConfig.of(settings)))


def run(config: TrainConfig) -> Iterator[Record]:
    """Train as `config` says; yields notes and progress, then the adapter.

    However it ends, the base is as before.
    """
    started = time.time()
    folder, state = open_folder(config)
    with accelerated(config, folder) as accelerator:
        family = _load_base(config, accelerator)
        plan = make_plan(config, family.traits, accelerator.mixed_precision)
        if state is not None:
            require_same(plan.config, folder, state)
        data = yield from prepare_data(plan, family, folder)
        base, pictures = base_hash(config.base, config.base_parts), data.sampler.pictures
        about = Trained(family, base, data.examples, data.buckets, pictures, started)
        chosen = chosen_layers(config, family)
        resting = _rested(config, family, accelerator.device)
        yield from _memory(plan, family, data, chosen, resting)
        with learning(config, family, chosen, captions_of(data.examples)) as learned:
            require_writable(learned, plan, family)
            if config.adapter.begin is not None:
                yield Note(f"going on from {config.adapter.begin}")
            for line in summary(family.components, learned.adapters):
                yield Note(line)
            if config.dry_run:
                yield from _rehearsed(plan, data, folder, accelerator)
                return
            job = assemble(plan, folder, family, data, learned, accelerator, about, resting)
            if state is not None:
                restore(job, state)
                yield Note(f"going on from step {job.step} of {plan.steps}")
            elif config.resume:
                yield Note(f"{folder.root} holds no checkpoint yet: starting at step 0")
            yield from ask_base(plan, data.dataset, accelerator.unwrap_model(job.module), accelerator)
            yield from _loop(job)


def _loop(job: Run) -> Generator[Record, None, None]:
    """Run the steps, with checkpoints and samples between them; always end with a checkpoint and the adapter file."""
    loop = job.config.loop
    if job.accelerator.is_main_process:
        begin(job.config, job.folder, job.step)
    if loop.tensorboard:
        # the steps after the checkpoint are done again: TensorBoard hides what an earlier run wrote of them
        job.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": job.step + 1}})
    if job.step == 0:
        yield from _validate(job)
        yield from _preview(job)
    began, first = time.perf_counter(), job.step
    with stop_on_signal() as stop:
        for record in _steps(job):
            job.step = record.step
            if job.average is not None:
                job.average.update(job.step)
            _log(job, record)
            yield _progress(record, job.plan.steps, began, first)
            yield from _validate(job)
            if loop.save_every and job.step % loop.save_every == 0 and job.step < job.plan.steps:
                _checkpoint(job)
            yield from _preview(job)
            if stop.requested:
                break
    _checkpoint(job)
    yield from _finish(job)


def _rehearsed(plan: Plan, data: Prepared, folder: RunFolder, accelerator: Accelerator) -> Iterator[Record]:
    """Draw what the run would see, and say how often."""
    if accelerator.is_main_process:
        yield from draw_images(data, folder.images)
    text = f"dry run: {outlook(plan, data, accelerator.num_processes)}\nlook at {folder.images}"
    yield Done(TrainedAdapter(folder.adapter(plan.config.format), step=0, finished=False), text)


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
    family = load_family(config.base or None, dtype, device, config.base_parts or None, config.quantize)
    if config.loop.gradient_checkpointing:
        family.components["denoiser"].enable_gradient_checkpointing()  # type: ignore[operator]
    # on a CPU convs are faster so
    family.components["denoiser"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return family


def _rested(config: TrainConfig, family: Family, device: torch.device) -> Resting:
    """Put what only the caching and the previews need into main memory; with text encoders, each step needs more."""
    resting = Resting(device=device) if config.adapter.reads else all_but_denoiser(family, device)
    resting.rest()
    return resting


def _memory(
    plan: Plan, family: Family, data: Prepared, chosen: Mapping[str, Begin], resting: Resting
) -> Iterator[Note]:
    """Say what memory the run takes, and whether the device has it."""
    config = plan.config
    options = fresh_options(config), loss_options(plan)
    try:
        readers = [name for name in family.components if name != "denoiser"] if config.adapter.words else []
        step = Step(chosen, *options, data.largest_batch(), config.optimizer.name, readers)
        found = estimate(family, step, away=resting.parts)
    except VisloraError:
        raise
    except Exception as error:  # nothing that a model does without its weights may keep it from training
        yield Note(f"memory: no estimate; this base cannot be run without its weights ({type(error).__name__})")
        return
    yield from memory_notes(found, free_bytes(resting.device), config)


def _checkpoint(job: Run) -> None:
    if not job.accelerator.is_main_process:
        return
    save_checkpoint(job.folder.checkpoints, job.step, state_of(job), job.config.loop.keep_checkpoints)
    if job.step < job.plan.steps:
        _save(job, job.adapter(job.step))
    best = lowest(job.measured)
    drop_adapters(job.folder, best.step if best else None)  # not before: a resumed run has the lowest of its checkpoint
    draw_losses(job.folder.log, job.folder.curve)


def _validate(job: Run) -> Iterator[Note]:
    """Measure the loss on the held-out images; save the adapter where it is the lowest so far."""
    held_out = job.data.held_out
    if not held_out.examples or not job.due(job.config.loop.validate_every):
        return
    # in every process alike: the others would but wait for the first
    with job.as_given():
        loss = validation_loss(job.accelerator.unwrap_model(job.module), held_out.batches(), job.config.seed)
    job.measured.append(Measured(job.step, loss))
    if job.accelerator.is_main_process:
        _append(job.folder.log, {"step": job.step, "validation_loss": loss})
        if lowest(job.measured) == job.measured[-1]:
            _save(job, job.adapter(job.step))
        yield Note(told(job.measured))
    job.accelerator.log({"validation_loss": loss}, step=job.step)


def _preview(job: Run) -> Iterator[Note]:
    if job.accelerator.is_main_process and job.due(job.config.sample.every):
        path = job.folder.samples / f"{job.step:06d}.png"
        captions = [example.caption for example in job.data.examples[:4]]
        sources = [source.path for source in job.data.sources[:4]]
        with job.resting.at_work(), job.as_given():
            preview(job.family, job.learned.adapters.values(), job.plan, captions, sources, path)
        yield Note(f"samples: {path}")


def _finish(job: Run) -> Generator[Record, None, None]:
    """Save the adapter."""
    finished = job.step >= job.plan.steps
    path = job.adapter(None if finished else job.step)
    if finished and job.accelerator.is_main_process:
        _save(job, path)
    text, best = f"adapter: {path}", lowest(job.measured)
    kept = job.adapter(best.step) if best else None
    if kept and not kept.exists():  # the run went on under another name
        kept = None
    if kept:
        text += f"\n{told(job.measured)}: {kept}"
    if not finished:
        text = f"stopped at step {job.step} of {job.plan.steps}; go on with --resume\n{text}"
    yield Done(TrainedAdapter(path, job.step, finished, kept), text, 0 if finished else 130)


def _save(job: Run, path: Path) -> None:
    with job.as_given():
        made = adapter_file(job.learned, job.plan, job.about, job.folder.name, job.step)
    formats.save(made, path, job.config.format)


def _append(log: Path, values: Mapping[str, Any]) -> None:
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _log(job: Run, record: StepRecord) -> None:
    if job.accelerator.is_main_process:
        _append(job.folder.log, asdict(record))
    values = {"loss": record.loss, "learning_rate": record.learning_rate, "grad_norm": record.grad_norm}
    job.accelerator.log(values, step=record.step)


def _progress(record: StepRecord, steps: int, began: float, first: int) -> Progress:
    rate = (record.step - first) / (time.perf_counter() - began)
    fields = {"loss": f"{record.loss:.4f}", "lr": f"{record.learning_rate:.2e}", "steps/s": f"{rate:.2f}"}
    return Progress("training", record.step, steps, dict(fields))
