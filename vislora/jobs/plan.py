"""The settings of a training run with everything filled in that they leave to the base."""

from __future__ import annotations

from dataclasses import dataclass

from vislora.config.train import TrainConfig
from vislora.models.base import Traits


@dataclass(frozen=True)
class Plan:
    """`config` holds the same figures as the fields beside it, which are never None."""

    config: TrainConfig
    steps: int
    batch_size: int
    learning_rate: float
    text_learning_rate: float
    word_learning_rate: float
    timestep_shift: float
    resolution: int

    @property
    def largest(self) -> int:
        """The largest of all resolutions."""
        return max([self.resolution, *self.config.data.more_resolutions])


def make_plan(config: TrainConfig, traits: Traits, precision: str) -> Plan:
    """Fill in what `config` leaves open from the base's traits; text encoders learn at half the rate by default.

    `precision`: the mixed precision that the device gives: no, bf16 or fp16.
    """
    rate = config.optimizer.learning_rate or traits.learning_rate
    text_rate = config.optimizer.text_encoder_learning_rate or rate / 2
    word_rate = config.optimizer.word_learning_rate or rate
    steps, batch_size = config.loop.steps or traits.train_steps, config.loop.batch_size or traits.batch_size
    shift = config.loop.timestep_shift or traits.timestep_shift
    resolution = config.data.resolution or traits.resolution
    rates = {"learning_rate": rate, "text_encoder_learning_rate": text_rate, "word_learning_rate": word_rate}
    loop = {"steps": steps, "batch_size": batch_size, "timestep_shift": shift, "mixed_precision": precision}
    sections = {
        "data": config.data.model_copy(update={"resolution": resolution}),
        "optimizer": config.optimizer.model_copy(update=rates),
        "loop": config.loop.model_copy(update=loop),
    }
    filled = config.model_copy(update=sections)
    return Plan(filled, steps, batch_size, rate, text_rate, word_rate, shift, resolution)


def images_at_once(resolution: int) -> int:
    """Return how many images of `resolution` squared pixels the VAE is given at once: 8, fewer above 256.

    An `AutoencoderKL` of the usual widths takes about 2.5 KiB a pixel in float32: eight of 1024 would be 20 GiB.
    """
    return min(8, max(1, 8 * 256**2 // resolution**2))
