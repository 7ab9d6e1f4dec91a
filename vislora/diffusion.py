"""Training objectives: how latents are noised, what the denoiser has to predict, how a timestep counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Distribution = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class Timesteps:
    """Which timesteps are trained how often. `distribution` None: the objective's usual one.

    `shift` moves them, beyond 1 towards noise, below towards the clean picture (Esser et al., arXiv 2403.03206,
    equation 23), on top of the shift that the objective may have.
    """

    distribution: Distribution | None = None
    shift: float = 1.0

    def draw(self, count: int, generator: torch.Generator, usual: Distribution) -> Tensor:
        """Return `count` noise levels from 0 to 1, on the CPU. `usual`: the distribution where none is set."""
        if (self.distribution or usual) == "uniform":
            return shifted(torch.rand(count, generator=generator), self.shift)
        return shifted(torch.sigmoid(torch.randn(count, generator=generator)), self.shift)


AS_TRAINED = Timesteps()


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Return shift u / (1 + (shift - 1) u) (arXiv 2403.03206, equation 23) of noise levels u from 0 to 1."""
    return shift * levels / (1 + (shift - 1) * levels)


class Objective(Protocol):
    """`t` is what the denoiser is given: one value per sample, in [0, 1000)."""

    @property
    def prediction(self) -> str:
        """What the denoiser predicts: epsilon, v or flow."""
        ...

    def sample_t(self, shape: Sequence[int], generator: torch.Generator, how: Timesteps = AS_TRAINED) -> Tensor:
        """Draw a timestep for each sample of latents of this shape, on the CPU. Default: as such bases are trained."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy latents at `t`."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the denoiser should predict."""
        ...

    def weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Return the weight of each sample's squared error, shape (batch,)."""
        ...


@dataclass(frozen=True)
class Discrete:
    """Denoising diffusion with a table of noise levels (Ho et al., arXiv 2006.11239, equation 4).

    `alphas_cumprod`: (timesteps,). Prediction of the noise, or of v (Salimans & Ho, arXiv 2202.00512, appendix D).
    """

    alphas_cumprod: Tensor
    prediction: Literal["epsilon", "v"]

    def sample_t(self, shape: Sequence[int], generator: torch.Generator, how: Timesteps = AS_TRAINED) -> Tensor:
        """Draw from all timesteps, uniformly unless `how` says otherwise."""
        count = len(self.alphas_cumprod)
        if how == AS_TRAINED:  # the very draws of diffusers' training scripts
            return torch.randint(count, (shape[0],), generator=generator)
        return (count * how.draw(shape[0], generator, "uniform")).long().clamp_max(count - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return sqrt(abar) x + sqrt(1 - abar) noise."""
        signal, spread = self._levels(t, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._levels(t, latents)
        return signal * noise - spread * latents

    def weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Return min(snr, gamma) / snr, for v over snr + 1 (Hang et al., arXiv 2303.09556, equation 8); else ones."""
        if min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        abar = self.alphas_cumprod.to(t.device)[t].float()
        snr = abar / (1 - abar).clamp_min(1e-8)
        clipped = snr.clamp_max(min_snr_gamma)
        return clipped / (snr if self.prediction == "epsilon" else snr + 1).clamp_min(1e-8)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod.to(like.device)[t].view(-1, *[1] * (like.dim() - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


@dataclass(frozen=True)
class GrowingShift:
    """A shift that grows with the picture: larger ones keep more of what they show under the same noise.

    mu is linear in the number of tokens, through (tokens[0], mu[0]) and (tokens[1], mu[1]); the shift is exp(mu), or
    mu where not `exponential` (black-forest-labs/flux, src/flux/sampling.py `get_schedule`). `patch`: side of a token.
    """

    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)
    patch: int = 2
    exponential: bool = True

    def of(self, height: int, width: int) -> float:
        """Return the shift for latents of this size."""
        count = (height // self.patch) * (width // self.patch)
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        mu = self.mu[0] + slope * (count - self.tokens[0])
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class Flow:
    """Rectified flow with logit-normal timesteps (Esser et al., arXiv 2403.03206, sections 2 and 3.1).

    `shift` moves the noise levels towards noise as the sampler does (ibid., equation 23); t = 1000 sigma.
    """

    shift: float | GrowingShift = 1.0
    prediction: str = "flow"

    def sample_t(self, shape: Sequence[int], generator: torch.Generator, how: Timesteps = AS_TRAINED) -> Tensor:
        """Draw 1000 sigma, sigma shifted, sigmoid(normal) before that unless `how` says otherwise."""
        shift = self.shift.of(*shape[-2:]) if isinstance(self.shift, GrowingShift) else self.shift
        return 1000.0 * shifted(how.draw(shape[0], generator, "logit-normal"), shift)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return (1 - sigma) x + sigma noise."""
        sigma = (t / 1000.0).view(-1, *[1] * (latents.dim() - 1)).to(latents.dtype)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity, noise - x."""
        return noise - latents

    def weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Return ones: the logit-normal draw already weights the timesteps."""
        return torch.ones_like(t, dtype=torch.float32)
