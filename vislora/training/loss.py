"""The loss of a batch, as the one module that Accelerate prepares: its only parameters are the adapters'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vislora.diffusion import AS_TRAINED, Timesteps
from vislora.inject.trained import AdapterSet
from vislora.models.base import Family
from vislora.models.words import LearnedWords


@dataclass(frozen=True)
class LossOptions:
    """How the error counts. `min_snr_gamma` None: all timesteps alike. `noise_offset`: in units of the noise.

    timesteps: which are drawn how often, for the images and for the priors.
    prior_weight, prior_share: of the difference to the base's prediction, where a batch has priors.
    reach: of a slider, where a batch has its ends.
    """

    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    prior_weight: float = 1.0
    prior_share: float = 0.5
    timesteps: Timesteps = AS_TRAINED
    reach: float = 1.0


@dataclass(frozen=True)
class Asked:
    """What the denoiser is given, and what it should predict. mask: how much each cell counts; None: all alike."""

    noisy: Tensor
    t: Tensor
    conditioning: dict[str, Any]
    target: Tensor
    mask: Tensor | None = None

    @property
    def given(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The arguments of `Family.predict`."""
        return self.noisy, self.t, self.conditioning


class Answer(NamedTuple):
    """A noisy latent, its timestep, and what the base alone predicts."""

    noisy: Tensor
    t: Tensor
    target: Tensor


def joined(parts: Sequence[Asked]) -> Asked | None:
    """Return all as one batch, which takes less time than several, or None where their shapes differ."""
    names = [*parts[0].conditioning]
    columns = [[part.noisy for part in parts], *([part.conditioning[name] for part in parts] for name in names)]
    if not all(_alike(column[0], other) for column in columns for other in column[1:]):
        return None
    whole: list[Any] = [list(chain(*some)) if isinstance(some[0], list) else torch.cat(some) for some in columns]
    noisy, *rest = whole
    t, target = torch.cat([part.t for part in parts]), torch.cat([part.target for part in parts])
    return Asked(noisy, t, dict(zip(names, rest, strict=True)), target)


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape[1:] == two.shape[1:]
    return isinstance(one, list) and isinstance(two, list)


class DenoisingLoss(nn.Module):
    """Mean weighted squared error of the denoiser's prediction.

    With priors, the same of its difference to what the base alone predicts for captions without the trigger: prior
    preservation (Ruiz et al., arXiv 2208.12242, equation 2) by the frozen model's prediction, on the images
    of the batch or on those that the base drew. On its own the base can be asked beforehand, once (`ask_base`).

    With the ends of a slider, what is to be predicted is not in the images: it is the base's prediction, moved by the
    difference of its predictions for both ends (Concept Sliders, Gandikota et al., arXiv 2311.12092).

    The frozen base is no child of this module, so that neither DDP nor a checkpoint ever sees its weights.
    """

    def __init__(
        self,
        family: Family,
        adapters: Mapping[str, AdapterSet],
        options: LossOptions,
        words: LearnedWords | None = None,
    ) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(dict(adapters))
        self.words = words
        self._family = (family,)  # a tuple hides the models from nn.Module's registration
        self._options = options
        self._answers: dict[int, list[Answer]] = {}

    def ask_base(self, batch: Mapping[str, Any], generator: torch.Generator) -> None:
        """Keep what the base alone predicts for a batch of priors, at noises and timesteps that `generator` draws.

        A step then takes an answer, drawn from those of its `prior_number`, for each of its priors, and asks no base.
        """
        noisy, t, _ = self._noised(batch["latents"], generator)
        target = self._by_base(noisy, t, lambda: self._conditioning(batch, t.device))
        for number, *found in zip(batch["number"].tolist(), noisy.cpu(), t.cpu(), target.cpu(), strict=True):
            self._answers.setdefault(number, []).append(Answer(*found))

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Return the loss of `batch`, as `data.dataset.collate` makes it.

        It has `latents`, `text` or `captions`, and where there are some the sizes, `source`, `mask`, priors, ends.

        Every random draw comes from `generator` (on the CPU), so a step is the same wherever it runs.
        """
        asked = self._asked(batch, *self._noised(batch["latents"], generator))
        if "prior_captions" not in batch:
            return self._error(self._predict(*asked.given), asked) + self._of_words()
        prior = self._prior(batch, asked, generator)
        predicted, kept = self._predictions([asked, prior])
        return self._error(predicted, asked) + self._options.prior_weight * self._error(kept, prior) + self._of_words()

    def _of_words(self) -> Tensor | float:
        """Return 0, with gradients for words that no caption of the batch has: processes wait for all gradients."""
        return 0.0 if self.words is None else 0.0 * sum(vectors.sum() for vectors in self.words.parameters())

    def _asked(self, batch: Mapping[str, Any], noisy: Tensor, t: Tensor, target: Tensor) -> Asked:
        if "more_captions" in batch:
            target = self._moved(batch, noisy, t)
        return Asked(noisy, t, self._conditioning(batch, t.device), target, batch.get("mask"))

    def _moved(self, batch: Mapping[str, Any], noisy: Tensor, t: Tensor) -> Tensor:
        """Return what strength 1 of a slider is to predict."""
        with self._base_alone():
            texts = [self._conditioning(batch, t.device, of) for of in ("", "more_", "less_")]
            here, more, less = self._predictions([Asked(noisy, t, text, noisy) for text in texts])
        return here + self._options.reach * (more - less)

    def _conditioning(self, batch: Mapping[str, Any], device: torch.device, of: str = "") -> dict[str, Any]:
        text = self._text(batch[f"{of}text"], batch.get(f"{of}captions", ()), device)
        return {**text, **self._beside(batch, "")}

    def _predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        return self._family[0].predict(noisy, t, conditioning).float()

    def _predictions(self, parts: Sequence[Asked]) -> Sequence[Tensor]:
        """Return what is predicted for each, in one batch where their shapes allow it."""
        whole = joined(parts)
        if whole is None:
            return [self._predict(*part.given) for part in parts]
        return self._predict(*whole.given).split([len(part.t) for part in parts])

    def _noised(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy latents, their timesteps and what is to be predicted, on the device that is trained on."""
        objective, device = self._family[0].objective, next(self.parameters()).device
        latents = latents.to(device)
        noise = self._noise(latents, generator)
        t = objective.sample_t(latents.shape, generator, self._options.timesteps).to(device)
        return objective.add_noise(latents, noise, t), t, objective.target(latents, noise, t)

    def _beside(self, batch: Mapping[str, Any], of: str) -> dict[str, Tensor]:
        """Return what the denoiser is told beside the text: sizes and source, as far as the batch has them."""
        device = next(self.parameters()).device
        beside = {"sizes": sizes_of(batch, of).to(device)} if f"{of}original_size" in batch else {}
        if f"{of}source" in batch:
            beside["source"] = batch[f"{of}source"].to(device)
        return beside

    def _prior(self, batch: Mapping[str, Any], asked: Asked, generator: torch.Generator) -> Asked:
        """Return what the base predicts for a share of the batch's priors: on their own pictures, or on the batch's."""
        own, rows = "prior_latents" in batch, max(1, round(self._options.prior_share * len(asked.t)))
        text = batch["prior_text"]
        some = None if text is None else {name: feature[:rows] for name, feature in text.items()}
        beside = {name: value[:rows] for name, value in self._beside(batch, "prior_" if own else "").items()}

        def conditioning() -> dict[str, Any]:
            return {**self._text(some, batch["prior_captions"][:rows], asked.t.device), **beside}

        if own and self._answers:
            noisy, t, target = self._answered(batch["prior_number"][:rows].tolist(), generator)
        else:
            noisy, t, _ = self._noised(batch["prior_latents"], generator) if own else (asked.noisy, asked.t, None)
            noisy, t = noisy[:rows], t[:rows]
            target = self._by_base(noisy, t, conditioning)
        return Asked(noisy, t, conditioning(), target)

    def _answered(self, numbers: Sequence[int], generator: torch.Generator) -> Sequence[Tensor]:
        """Return noisy latents, timesteps and the base's predictions for these pictures."""
        device = next(self.parameters()).device
        chances = torch.rand(len(numbers), generator=generator).tolist()
        answers = [self._answers[number] for number in numbers]
        taken = [some[int(chance * len(some))] for some, chance in zip(answers, chances, strict=True)]
        return [torch.stack(part).to(device) for part in zip(*taken, strict=True)]

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """Have all adapters rest for a while, those of the text encoders, too; nothing is tracked."""
        with torch.no_grad(), ExitStack() as stack:
            for adapters in self.adapters.values():
                stack.enter_context(adapters.resting())  # type: ignore[operator]
            yield

    def _by_base(self, noisy: Tensor, t: Tensor, conditioning: Callable[[], dict[str, Any]]) -> Tensor:
        """Return what the base alone predicts."""
        with self._base_alone():
            return self._predict(noisy, t, conditioning())

    def _text(self, text: Mapping[str, Any] | None, captions: Sequence[str], device: torch.device) -> dict[str, Any]:
        return self._family[0].encode_prompt(list(captions)) if text is None else _to(text, device)

    def _error(self, predicted: Tensor, asked: Asked) -> Tensor:
        error = mean_of((predicted - asked.target).square(), asked.mask)
        return (error * self._family[0].objective.weight(asked.t, self._options.min_snr_gamma)).mean()

    def _noise(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator)
        if self._options.noise_offset:
            shape = (*latents.shape[:2], *[1] * (latents.dim() - 2))
            noise = noise + self._options.noise_offset * torch.randn(shape, generator=generator)
        return noise.to(latents.device)


def mean_of(error: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of each row of `error` (batch, ..., height, width), (batch,): of what `mask` keeps, if given.

    mask: (batch, 1, height, width), from 0 to 1, somewhere above 0. A row counts as much however little is kept of it.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    shape = (len(mask), *[1] * (error.dim() - 3), *mask.shape[-2:])
    weights = mask.to(error).reshape(shape).expand_as(error)
    return (error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def sizes_of(batch: Mapping[str, Any], of: str = "") -> Tensor:
    """Return height and width of the originals, top and left of the crops, height and width of these: (batch, 6).

    `of`: what comes before the names in `batch`: `prior_`, or nothing.
    """
    return torch.cat([batch[f"{of}{name}"] for name in ("original_size", "crop_top_left", "target_size")], 1)


def _to(features: Mapping[str, Tensor | list[Tensor]], device: torch.device) -> dict[str, Any]:
    return {
        name: found.to(device) if isinstance(found, Tensor) else [row.to(device) for row in found]
        for name, found in features.items()
    }
