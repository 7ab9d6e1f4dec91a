"""What memory a training run takes, estimated before its first step by running the real modules without weights.

Exact: weights, adapter, gradients and optimizer. Of a step, what its forward pass keeps for the gradients is counted;
the backward pass needs more for a moment. Not in it: the caching of images before, the float32 norms of mixed
precision, what kernels use for themselves, the device's own context, gaps between blocks of memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vislora.config.train import TrainConfig
from vislora.inject.trained import Begin, FreshOptions, inject_trained
from vislora.models.base import Family
from vislora.models.weightless import weightless
from vislora.records import Note
from vislora.training.loss import DenoisingLoss, LossOptions
from vislora.training.memory import kept_bytes, module_bytes, optimizer_bytes

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device in training.

    weights: component -> bytes, of all that is loaded. adapter: with its gradients. activations: what is kept of a step
    for its gradients; with gradient checkpointing, a block's own share on top, as one at a time is computed again.
    """

    weights: Mapping[str, int]
    adapter: int
    optimizer: int
    activations: int

    @property
    def step(self) -> int:
        """What comes to the weights."""
        return self.adapter + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """The weights and a step."""
        return sum(self.weights.values()) + self.step

    @property
    def line(self) -> str:
        """The sum and its parts as text."""
        parts = {**self.weights, "adapter": self.adapter, "optimizer": self.optimizer, "activations": self.activations}
        shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        return f"memory (estimated): {size_text(self.total)}: {shown}"


@dataclass(frozen=True)
class Step:
    """What a step is made of: layers by component, how they and the loss are made, the batch, the optimizer.

    readers: text encoders whose input is learned.
    """

    chosen: Mapping[str, Begin]
    fresh: FreshOptions
    loss: LossOptions
    batch: Mapping[str, Any]
    optimizer: str
    readers: Collection[str] = ()


def estimate(family: Family, step: Step, away: Collection[str] = ()) -> Estimate:
    """Return what training takes; `family` is loaded, without adapters, and stays as it is.

    away: modules of its pipeline that do not count, as they are not on the device.
    Raises what torch does for a model whose computing depends on what is in its tensors: that cannot be foreseen.
    """
    bare = weightless(family, {"denoiser", *step.chosen, *step.readers})
    return replace(bare_estimate(bare, step), weights=weight_bytes(family, away))


def bare_estimate(bare: Family, step: Step) -> Estimate:
    """Return the estimate for a family that is on the meta device already; it has adapters afterwards."""
    weights = weight_bytes(bare)
    dtype = next(bare.components["denoiser"].parameters()).dtype
    adapters = {
        name: inject_trained(bare.components[name], "estimate", begin, step.fresh)
        for name, begin in step.chosen.items()
    }
    for name in step.readers:
        bare.components[name].get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]
    module = DenoisingLoss(bare, adapters, step.loss)
    sizes = module_bytes(module)
    state = optimizer_bytes(step.optimizer, module.parameters())
    for parameter in module.parameters():  # layers hold them too, so each is changed in its place; autocast's type
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().to("meta", dtype)))
    denoiser = bare.components["denoiser"]
    lasting: list[torch.Tensor] = [*module.parameters()]
    for part in bare.components.values():
        lasting += [*part.parameters(), *part.buffers()]
    kept = kept_bytes(lambda: module(step.batch, torch.Generator()), lasting)
    if getattr(denoiser, "is_gradient_checkpointing", False):
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
        blocks = max((len(part) for part in denoiser.modules() if isinstance(part, nn.ModuleList)), default=1)
        kept += kept_bytes(lambda: module(step.batch, torch.Generator()), lasting) // max(1, blocks)
    return Estimate(weights, 2 * sizes, state, kept)


def weight_bytes(family: Family, away: Collection[str] = ()) -> dict[str, int]:
    """Return component -> bytes of the pipeline's modules but `away`; one without adapters has its name there."""
    names = {attribute: name for name, attribute in family.card.attributes.items()}
    here = {name: part for name, part in family.pipeline.components.items() if name not in away}
    modules = {name: part for name, part in here.items() if isinstance(part, nn.Module)}
    sizes = {names.get(name, name): module_bytes(part) for name, part in modules.items()}
    return dict(sorted(sizes.items(), key=lambda item: item[0] != "denoiser"))


def size_text(size: int) -> str:
    """Return a size as `3.21 GiB`, or `12.3 MiB` when it is small."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / MIB:.1f} MiB"


def memory_notes(found: Estimate, free: int | None, config: TrainConfig) -> Iterator[Note]:
    """Say the estimate; warn when fewer bytes are `free` (None: nobody knows) than a step takes beside the weights.

    `config`: the settings with everything filled in.
    """
    yield Note(found.line)
    if free is not None and free < found.step:
        text = f"memory: a step takes about {size_text(found.step)} beside the weights, {size_text(free)} are free"
        yield Note(f"{text}; what helps: {', '.join(_savings(config))}", "warning")


def _savings(config: TrainConfig) -> Iterator[str]:
    """Yield the settings that save memory and are not at their end yet, those with the most effect first."""
    loop = config.loop
    if not loop.gradient_checkpointing:
        yield "--gradient-checkpointing"
    if config.quantize == "no":
        yield "--quantize int8 or nf4"
    if loop.batch_size != 1:
        yield "a smaller --batch-size with --gradient-accumulation"
    if loop.mixed_precision == "no":
        yield "--mixed-precision bf16"
    if config.adapter.reads:
        yield "no --text-encoders or --words"
    yield "a smaller --resolution or --rank"
