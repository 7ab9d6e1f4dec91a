"""What the families have in common whose denoiser is a transformer: one file each, which adds what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vislora.diffusion import Objective
from vislora.models.base import Card, Traits, absent_parts
from vislora.models.parts import encode_scaled, flow_of


class Dit:
    """A loaded pipeline with a `transformer`. `left_out`: parts of its folder that are of no use here."""

    card: ClassVar[Card]
    left_out: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: Any, traits: Traits) -> None:
        self.pipeline = pipeline
        self.traits = traits
        found = {name: getattr(pipeline, attribute) for name, attribute in self.card.attributes.items()}
        self.components: dict[str, nn.Module] = {name: module for name, module in found.items() if module is not None}
        self.objective = self.read_objective(pipeline.scheduler)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device) -> Self:
        """Load a diffusers folder; its index says which of the family's pipelines it is."""
        from diffusers import DiffusionPipeline

        parts = {**absent_parts(path), **dict.fromkeys(cls.left_out)}
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype, **parts).to(device)
        return cls(pipeline, cls.describe(path, pipeline))

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits of a pipeline."""
        raise NotImplementedError

    @staticmethod
    def read_objective(scheduler: Any) -> Objective:
        """Return the objective that the scheduler tells."""
        return flow_of(scheduler)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the shifted and scaled mode of the VAE's posterior."""
        return encode_scaled(self.pipeline.vae, pixels)


def tags(version: str, prediction: str = "flow") -> dict[str, str]:
    """Return metadata keys of sd-scripts and ModelSpec for adapters of the base `version`."""
    return {
        "ss_base_model_version": version,
        "ss_v2": "False",
        "modelspec.architecture": f"{version}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": prediction,
    }
