"""ZipLoRA: two adapters merged by learned factors of their columns (Shah et al., arXiv 2311.13600, section 3.2).

    W = W0 + dW1 diag(m1) + dW2 diag(m2)
    L = sum_i |e_W(x_i, p_i) - e_Wi(x_i, p_i)|^2 + lambda sum_layers |cos(m1, m2)|         (equations 2 to 4)

The merged model has to predict what each adapter alone predicts for its own prompts p_i, and the factors of a layer
have to be apart. x_i are noisy latents of images that the adapter made itself. A diag(m) is A with its columns scaled,
so the result is an ordinary adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vislora.algebra.merge import Part
from vislora.algebra.to_lora import to_lora
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.parts import LayerAdapter
from vislora.inject.stack import existing_stack
from vislora.jobs.pipelines import attach, eject, set_strengths
from vislora.models.base import Family
from vislora.models.sampling import Sampling, Shot, make_images
from vislora.records import Progress

BATCH = 2


@dataclass(frozen=True)
class ZipOptions:
    """steps, rate: of Adam. apart: lambda. seed: of noise, timesteps and images."""

    steps: int = 100
    rate: float = 0.01
    apart: float = 0.01
    seed: int = 0


@dataclass
class _Layer:
    """A layer that both adapters are on: their down projections and the factors of their columns."""

    adapters: list[LayerAdapter]
    downs: list[Tensor]
    factors: list[nn.Parameter]

    def scale(self, factors: Sequence[Tensor]) -> None:
        """Give the adapters down projections with scaled columns."""
        for adapter, down, factor in zip(self.adapters, self.downs, factors, strict=True):
            adapter.slots["down"] = down * factor.view(1, -1, *[1] * (down.dim() - 2))

    def reset(self) -> None:
        """Give the adapters their own down projections."""
        for adapter, down in zip(self.adapters, self.downs, strict=True):
            adapter.slots["down"] = down


def learn(
    family: Family, parts: Sequence[Part], prompts: Mapping[str, Sequence[str]], options: ZipOptions
) -> Iterator[Progress | list[Part]]:
    """Learn the factors on a loaded base; yields progress, and at the end the parts with scaled columns.

    prompts: name of each part -> what it is asked for. The base is afterwards as before. Raises `ConfigError` for other
    than two parts or missing prompts, `AdapterMismatchError` when they share no layer of the denoiser.
    """
    _require_two(parts, prompts)
    plain = [_plain(part) for part in parts]
    names = [part.name for part in plain]
    try:
        for part in plain:
            attach(family.pipeline, part.adapter, part.name, 0.0)
        examples = [_examples(family, name, names, prompts[name], options.seed) for name in names]
        layers = _shared(family.components["denoiser"], names)
        yield from _fit(family, names, layers, examples, options)
        yield [_scaled(part, number, layers) for number, part in enumerate(plain)]
    finally:
        for name in names:
            _eject_if_there(family, name)


def _require_two(parts: Sequence[Part], prompts: Mapping[str, Sequence[str]]) -> None:
    if len(parts) != 2:
        raise ConfigError(f"method ziplora merges two adapters, {len(parts)} are given")
    for part in parts:
        if not prompts.get(part.name):
            given = ", ".join(prompts) or "none"
            raise ConfigError(f"method ziplora needs prompts of each adapter: none for '{part.name}' (given: {given})")
        if {part.weight(module) for module in part.adapter.modules} != {1.0}:
            raise ConfigError(f"method ziplora learns how strong '{part.name}' is on each column: give it no strength")


def _plain(part: Part) -> Part:
    """Return the part as plain LoRA. Raises `AdapterMismatchError` for one that is not only that then."""
    adapter, _ = to_lora(part.adapter)
    odd = [module for module in adapter.modules if module.tensors.keys() != {"down", "up"} or module.needs_base]
    if odd:
        raise AdapterMismatchError(f"method ziplora scales columns of LoRAs; '{odd[0].name}' of '{part.name}' is none")
    return replace(part, adapter=adapter)


def _examples(
    family: Family, name: str, names: Sequence[str], prompts: Sequence[str], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return latents of what an adapter makes of its prompts, and their text features."""
    _only(family, name, names)
    side, traits = family.traits.resolution, family.traits
    how = Sampling(traits.steps, traits.guidance_scale, side, side)
    shots = [Shot(prompt, "", seed + number) for number, prompt in enumerate(prompts)]
    images = [image for batch in make_images(family, shots, how, BATCH) for image in batch]
    pixels = torch.stack([_pixels(image) for image in images])
    with torch.no_grad():
        return family.encode_image(pixels), family.encode_prompt(list(prompts))


def _pixels(image: Any) -> Tensor:
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1.0


def _only(family: Family, name: str | None, names: Sequence[str]) -> None:
    set_strengths(family.pipeline, {other: float(name in (None, other)) for other in names}, engine="stacked")


def _shared(denoiser: nn.Module, names: Sequence[str]) -> dict[str, _Layer]:
    stack = existing_stack(denoiser)
    assert stack is not None
    one, other = (stack.adapters(name) for name in names)
    found = {}
    for path in one.keys() & other.keys():
        adapters = [one[path], other[path]]
        downs = [adapter.slots["down"].detach().float() for adapter in adapters]
        factors = [nn.Parameter(torch.ones(down.shape[1], device=down.device)) for down in downs]
        found[path] = _Layer(adapters, downs, factors)
    if not found:
        raise AdapterMismatchError(f"'{names[0]}' and '{names[1]}' share no layer of the denoiser: `sum` is exact")
    return dict(sorted(found.items()))


def _fit(
    family: Family,
    names: Sequence[str],
    layers: Mapping[str, _Layer],
    examples: Sequence[tuple[Tensor, dict[str, Tensor]]],
    options: ZipOptions,
) -> Iterator[Progress]:
    optimizer = torch.optim.Adam([factor for layer in layers.values() for factor in layer.factors], options.rate)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        drawn = [_drawn(family, *example, generator) for example in examples]
        targets = []
        for layer in layers.values():
            layer.reset()
        for name, (noisy, t, text) in zip(names, drawn, strict=True):
            _only(family, name, names)
            with torch.no_grad():
                targets.append(family.predict(noisy, t, text).float())
        _only(family, None, names)
        for layer in layers.values():
            layer.scale(layer.factors)
        total = options.apart * _alike(layers)
        for (noisy, t, text), target in zip(drawn, targets, strict=True):
            total = total + (family.predict(noisy, t, text).float() - target).square().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        yield Progress("zipping", step + 1, options.steps, {"loss": float(total.detach())})


def _drawn(
    family: Family, latents: Tensor, text: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return noisy latents, timesteps and text features of a few examples."""
    chosen = torch.randint(len(latents), (BATCH,), generator=generator)
    noise = torch.randn((BATCH, *latents.shape[1:]), generator=generator).to(latents.device)
    t = family.objective.sample_t((BATCH, *latents.shape[1:]), generator).to(latents.device)
    noisy = family.objective.add_noise(latents[chosen], noise, t)
    return noisy, t, {name: features[chosen] for name, features in text.items()}


def _alike(layers: Mapping[str, _Layer]) -> Tensor:
    """Return the sum over layers of |cos(m1, m2)|."""
    return torch.stack(
        [cosine_similarity(layer.factors[0], layer.factors[1], dim=0).abs() for layer in layers.values()]
    ).sum()


def _scaled(part: Part, number: int, layers: Mapping[str, _Layer]) -> Part:
    modules = []
    for module in part.adapter.modules:
        layer = layers.get(module.path or "") if module.component == "denoiser" else None
        if layer is not None:
            down = module.tensors["down"]
            factor = layer.factors[number].detach().cpu().view(1, -1, *[1] * (down.dim() - 2))
            module = replace(module, tensors={**module.tensors, "down": down.float() * factor}, notes=[])
        modules.append(module)
    return replace(part, adapter=replace(part.adapter, modules=modules))


def _eject_if_there(family: Family, name: str) -> None:
    if any((stack := existing_stack(model)) and name in stack.strengths for model in family.components.values()):
        eject(family.pipeline, name)
