"""Train the denoiser and the text encoder together, from scratch, on latents."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from base.parts import make_scheduler
from base.pictures import CAPTIONS
from base.progress import Budget
from base.vae import sampled

RATE, CLIP, SNR_LIMIT = 1.2e-3, 1.0, 5.0
AVERAGE = 0.9995
SAVE_EVERY = 60.0


class Both(nn.Module):
    """The denoiser and the text encoder as one model."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Return the predicted noise. noisy: (batch, 4, height, width); t: (batch,); ids: (batch, length)."""
        prediction: Tensor = self.unet(noisy, t, self.text(ids)[0]).sample
        return prediction


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
    """Everything to learn from, on the device: latents as moments, and the tokens of every caption."""

    def __init__(self, moments: Tensor, tokens: Tensor, scaling_factor: float) -> None:
        self.moments, self.tokens, self.scaling_factor = moments, tokens, scaling_factor
        self.shares = torch.tensor([share for _, share in CAPTIONS], device=moments.device)
        self.alphas = make_scheduler().alphas_cumprod.to(moments.device)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return noisy latents, timesteps, ids, the noise, and the weight of each (min-SNR, arXiv 2303.09556 eq. 5)."""
        device = self.moments.device
        chosen = torch.randint(len(self.moments), (count,), device=device)
        latents = sampled(self.moments[chosen]) * self.scaling_factor
        which = torch.multinomial(self.shares, count, replacement=True)
        t = torch.randint(len(self.alphas), (count,), device=device)
        alpha, noise = self.alphas[t].view(-1, 1, 1, 1), torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise
        snr = self.alphas[t] / (1.0 - self.alphas[t])
        return noisy, t, self.tokens[chosen, which], noise, snr.clamp(max=SNR_LIMIT) / snr


class Training:
    """The model, its average and optimizer; `save` and `resume` keep all of it in one file."""

    def __init__(self, model: Both, accelerator: Accelerator, state: Path) -> None:
        fused = accelerator.device.type == "cuda"
        model.to(accelerator.device)
        if fused:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = Average(model)  # before `prepare`, which puts a forward of its own into the model
        optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        self.accelerator, self._state = accelerator, state
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        self.run = torch.compile(self.model) if fused else self.model

    def step(self, examples: Examples, batch: int, factor: float) -> Tensor:
        """Do one step and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * factor
        noisy, t, ids, noise, weight = examples.draw(batch)
        with self.accelerator.autocast():
            predicted = self.run(noisy, t, ids)
        loss = ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weight).mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.accelerator.unwrap_model(self.model))
        return loss.detach()

    def save(self, budget: Budget) -> None:
        """Write the state aside, then put it in place."""
        parts = {"model": self.accelerator.unwrap_model(self.model), "average": self.average.model}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"optimizer": self.optimizer.state_dict()}
        state |= {"spent": budget.spent, "step": budget.step, "count": self.average.count}
        aside = self._state.with_suffix(".part")
        torch.save(state, aside)
        os.replace(aside, self._state)

    def resume(self) -> tuple[float, int]:
        """Read the state, if there is one; return the seconds spent and the steps done."""
        if not self._state.exists():
            return 0.0, 0
        state = torch.load(self._state, map_location=self.accelerator.device, weights_only=True)
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.count = state["count"]
        return state["spent"], state["step"]


def train_denoiser(
    training: Training, examples: Examples, budget: Budget, batch: int, export: Callable[[Both], None]
) -> None:
    """Train until the budget is spent; every minute save the state and `export` the average."""
    saved, total, steps = budget.spent, torch.zeros((), device=examples.moments.device), 0
    for factor in budget.steps():
        total, steps = total + training.step(examples, batch, factor), steps + 1
        if budget.due(10.0, batch):
            budget.tell(loss=float(total) / steps, rate=RATE * factor)
            total, steps = torch.zeros_like(total), 0
        if budget.spent - saved > SAVE_EVERY:
            training.save(budget)
            export(training.average.model)  # type: ignore[arg-type]
            saved = budget.spent
    training.save(budget)
    export(training.average.model)  # type: ignore[arg-type]
