"""Train the denoiser and the text encoders together, from scratch, on latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPTokenizer

from base.layout import Layout, Noised
from base.pictures import Pictures, draw_forms
from base.progress import Budget
from base.state import load_state, save_state
from base.vae import sampled

RATE, CLIP = 1.2e-3, 1.0
AVERAGE = 0.999
DROPPING = 0.5
"""Share of the steps that train with dropout: with it to the end, adapters on the base draw worse; without any,
unseen pairs are worse (benchmarks/results/base.md)."""


class Average:
    """The running average of a model's parameters, which is what gets exported."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model`, faster in the beginning."""
        self.count += 1
        keep = min(AVERAGE, (1.0 + self.count) / (10.0 + self.count))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1.0 - keep)


class Examples:
    """Everything to learn from, on the device: latents as moments, and captions of each, drawn anew every time.

    moments: (shifts, pictures, 8, height, width), of the pictures moved by each of `shifts`, (shifts, 2) in pixels.
    `texts`: as in `Layout`.
    """

    def __init__(
        self,
        moments: Tensor,
        shifts: Tensor,
        pictures: Pictures,
        tokenizer: CLIPTokenizer,
        scaling_factor: float,
        texts: int = 1,
    ) -> None:
        self.moments, self.shifts, self.scaling_factor = moments, shifts, scaling_factor
        self._pictures, self._tokenizer, self._texts = pictures, tokenizer, texts

    def draw(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """Return scaled latents (count, 4, height, width) and what the model is told.

        That is the ids of each of the captions (count, length), and where pictures are moved, by how much (count, 2).
        """
        device = self.moments.device
        chosen = torch.randint(self.moments.shape[1], (count,))
        forms = draw_forms(count)
        described = [chosen, *(self._pictures.beside(chosen) for _ in range(1, self._texts))]
        ids = [self._ids(self._pictures.captions(each, forms)).to(device) for each in described]
        several = len(self.shifts) > 1
        moved = torch.randint(len(self.shifts), (count,)) if several else torch.zeros_like(chosen)
        latents = sampled(self.moments[moved.to(device), chosen.to(device)]) * self.scaling_factor
        return latents, [*ids, self.shifts[moved].to(device)] if several else ids

    def _ids(self, texts: list[str]) -> Tensor:
        found: Tensor = self._tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return found


class Training:
    """The model, its average and optimizer; `save` and `resume` keep all of it in one file. rate: the highest one."""

    def __init__(
        self, layout: Layout, model: nn.Module, accelerator: Accelerator, state: Path, rate: float = RATE
    ) -> None:
        model.to(accelerator.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = Average(model)  # before `prepare`, which puts a forward of its own into the model
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.layout, self.accelerator, self._state, self.rate = layout, accelerator, state, rate
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.run = self.model

    def compile(self, examples: Examples, batch: int) -> str:
        """Have torch compile the model, which takes minutes; return why it is left as it was, if it is.

        That is where there is no C++ compiler, and where the gradients of what was compiled are wrong: torch 2.13 loses
        those of all that is before a nearest upsampling, in bfloat16 on a CPU, and says nothing.
        """
        fast = torch.compile(self.model, options={"fallback_random": True})  # the same dropout as without compiling
        exact = partial(type(self.model).forward, self.model)  # no autocast
        with torch.random.fork_rng(), _moved(self.model):
            latents, told = examples.draw(batch)
            noised = self.layout.noised(latents)
            try:
                plain, made = (self._gradients(run, noised, told) for run in (exact, fast))
            except (RuntimeError, IndexError) as error:  # the second: torch 2.13, float32, a DiT with dropout
                return f"cannot be compiled: {str(error).splitlines()[0]}"
        whole = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
        for name, gradient in plain.items():
            near = (made[name] - gradient).norm() <= 0.5 * gradient.norm()  # what is no number is not near
            if not near and gradient.norm() > 1e-3 * whole:
                return f"compiled, the gradient of {name} is another one"
        self.run = fast
        return ""

    def _gradients(self, run: Callable[..., Tensor], noised: Noised, told: list[Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # the same dropout in all that is compared
        self.accelerator.backward(self._loss(run, noised, told))
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        found = {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in named}
        self.optimizer.zero_grad()
        return found

    def _loss(self, run: Callable[..., Tensor], noised: Noised, told: list[Tensor]) -> Tensor:
        predicted = run(noised.latents, noised.t, *told)
        return ((predicted.float() - noised.target).square().mean(dim=(1, 2, 3)) * noised.weight).mean()

    def step(self, examples: Examples, batch: int, factor: float) -> Tensor:
        """Do one step and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        latents, told = examples.draw(batch)
        loss = self._loss(self.run, self.layout.noised(latents), told)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.accelerator.unwrap_model(self.model))
        return loss.detach()

    def save(self, budget: Budget) -> None:
        """Write the state."""
        save_state(self._state, self._parts, budget, count=self.average.count)

    def resume(self, budget: Budget) -> None:
        """Read the state, if there is one."""
        state = load_state(self._state, self._parts, budget, self.accelerator.device)
        self.average.count = state.get("count", 0)

    @property
    def _parts(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        return {"model": model, "average": self.average.model, "optimizer": self.optimizer}


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Have noise on the parameters meanwhile: in a fresh model zeros keep the gradient from most of them."""
    parameters: list[Tensor] = list(model.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


def stop_dropping(model: nn.Module) -> None:
    """Train without dropout from here on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def train_denoiser(
    training: Training, examples: Examples, budget: Budget, batch: int, export: Callable[[nn.Module], None]
) -> None:
    """Train until the budget is spent; now and then save the state and `export` the average."""
    total, steps = torch.zeros((), device=examples.moments.device), 0
    for factor in budget.steps():
        if budget.step > DROPPING * budget.total:
            stop_dropping(training.model)
        total, steps = total + training.step(examples, batch, factor), steps + 1
        if budget.due(10.0, batch):
            budget.tell(loss=float(total) / steps, rate=training.rate * factor)
            total, steps = torch.zeros_like(total), 0
        if budget.saves(examples.moments.device):
            training.save(budget)
            export(training.average.model)
    training.save(budget)
    export(training.average.model)
