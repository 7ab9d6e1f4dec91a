"""Train the VAE on random crops, then its decoder on whole pictures, when the latents are settled."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from base.pictures import as_input
from base.progress import Budget
from base.state import load_state, save_state

CROP, RATE = 32, 2e-3
EDGES, PRIOR = 0.5, 2e-4
"""Weights of the loss of the gradients of the picture, and of the Kullback-Leibler divergence per latent number."""
NOISE = 0.7
"""Most noise on the latents that the decoder is finished on, in their deviations: what a denoiser draws is a little off
too, and paper that is nearly white is meant to be white (noise-augmented decoding, Zheng et al., arXiv 2510.11690)."""


def train_vae(
    vae: AutoencoderKL, pixels: Tensor, budget: Budget, accelerator: Accelerator, batch: int, state: Path
) -> None:
    """Train `vae` in place on `pixels` (n, 3, height, width), uint8, until the budget is spent. `state`: its file."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    model, optimizer = accelerator.prepare(vae, optimizer)
    vae.train()
    parts = {"model": vae, "optimizer": optimizer}
    load_state(state, parts, budget, accelerator.device)
    for factor in budget.steps():
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        x = crops(pixels, batch)
        with accelerator.autocast():
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample
        picture, prior = pixel_loss(out.float(), x), posterior.kl().mean() / posterior.mean[0].numel()
        accelerator.backward(picture + PRIOR * prior)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if budget.due(10.0, batch):
            error = (out.detach().float().clamp(-1.0, 1.0) - x).square().mean().item()
            budget.tell(loss=picture.item(), psnr=10.0 * math.log10(4.0 / error))
        if budget.saves(accelerator.device):
            save_state(state, parts, budget)
    vae.eval()


def finish_decoder(
    vae: AutoencoderKL, moments: Tensor, pixels: Tensor, budget: Budget, run: Accelerator, batch: int, state: Path
) -> None:
    """Train the decoder of `vae` alone, in place, on latents drawn from `moments`, with noise: they stay what they are.

    `state`: the file of this training's state. The VAE's `scaling_factor` is that of `moments`, as `encode` sets it.
    """
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = run.prepare(torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.99)))
    parts = {"model": vae, "optimizer": optimizer}
    load_state(state, parts, budget, run.device)
    decode = torch.compile(vae.decode) if run.device.type == "cuda" else vae.decode
    for factor in budget.steps():
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        chosen = torch.randint(len(pixels), (batch,), device=pixels.device)
        x = as_input(pixels[chosen])
        latents = sampled(moments[chosen])
        amount = NOISE / vae.config.scaling_factor * torch.rand(batch, 1, 1, 1, device=latents.device)
        with run.autocast():
            out = decode(latents + amount * noise_like(latents)).sample.float()
        error = (out - x).square().mean()
        loss = pixel_loss(out, x) + error
        run.backward(loss)
        run.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if budget.due(10.0, batch):
            budget.tell(loss=loss.item(), psnr=10.0 * math.log10(4.0 / error.item()))
        if budget.saves(run.device):
            save_state(state, parts, budget)


def noise_like(latents: Tensor) -> Tensor:
    """Return noise for latents (n, c, height, width), of a deviation of 0.9: fine, of 4 x 4 drawn large, and flat.

    All alike in weight. Interpolation takes some of the second.
    """
    count, channels, *size = latents.shape
    parts = [
        F.interpolate(torch.randn(count, channels, *grid, device=latents.device), size=size, mode="bilinear")
        for grid in ((1, 1), (4, 4), size)
    ]
    return torch.stack(parts).sum(dim=0) / math.sqrt(len(parts))


def pixel_loss(out: Tensor, x: Tensor) -> Tensor:
    """Return the mean absolute difference of two pictures, and of their differences between neighbours."""
    apart = out - x
    across, down = apart[..., 1:] - apart[..., :-1], apart[..., 1:, :] - apart[..., :-1, :]
    return apart.abs().mean() + EDGES * (across.abs().mean() + down.abs().mean())


def crops(pixels: Tensor, count: int) -> Tensor:
    """Return random crops in [-1, 1], some of them mirrored, with other colours or inverted."""
    device, side = pixels.device, pixels.shape[-1]
    chosen = torch.randint(len(pixels), (count, 1, 1, 1), device=device)
    top, left = torch.randint(side - CROP + 1, (2, count, 1, 1, 1), device=device)
    run, colours = torch.arange(CROP, device=device), torch.randperm(3, device=device)
    colours = colours if torch.rand(()) < 0.3 else colours.sort().values
    x = as_input(
        pixels[chosen, colours.view(1, 3, 1, 1), top + run.view(1, 1, CROP, 1), left + run.view(1, 1, 1, CROP)]
    )
    x = x.flip(-1) if torch.rand(()) < 0.5 else x
    inverted = torch.rand(count, 1, 1, 1, device=device) < 0.15
    return torch.where(inverted, -x, x)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, batch: int = 256) -> Tensor:
    """Return the moments of the latents, (n, 8, height / 4, width / 4), and set `scaling_factor` to 1 / their std."""
    moments = torch.cat([vae.encode(as_input(part)).latent_dist.parameters for part in pixels.split(batch)]).float()
    vae.register_to_config(scaling_factor=1.0 / float(sampled(moments).std()))
    return moments


@torch.no_grad()
def encode_moved(vae: AutoencoderKL, pixels: Tensor, shifts: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the moments (shifts, n, 8, height / 4, width / 4) of the pictures moved by each of `shifts`.

    shifts: (shifts, 2), pixels to the left and up; what comes into sight is the nearest of the picture's edge.
    """
    most = int(shifts.abs().max())
    wide = F.pad(pixels.float(), (most,) * 4, mode="replicate").to(torch.uint8)
    height, width = pixels.shape[-2:]
    found = []
    for number, (left, up) in enumerate((shifts + most).tolist(), 1):
        views = wide[..., up : up + height, left : left + width]
        with accelerator.autocast():
            parts = [vae.encode(as_input(part)).latent_dist.parameters.float() for part in views.split(64)]
        found.append(torch.cat(parts))
        print(f"encoded {number} of {len(shifts)} shifts", flush=True)
    return torch.stack(found)


def sampled(moments: Tensor) -> Tensor:
    """Draw latents, not scaled, from their moments."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.randn_like(mean)
