"""The contract of a model family, and finding the family of a folder or of somebody's pipeline."""

from __future__ import annotations

import inspect
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from vislora.config.own import OwnDefaults
from vislora.diffusion import Objective
from vislora.errors import ConfigError, ModelError, VisloraError, nearest
from vislora.models.quantized import quantize_base, require_library
from vislora.registry import FAMILIES

EMBEDDED = Path(__file__).parent.parent / "assets" / "base"
"""The small base model that ships with the package."""
SHIPPED = {"": EMBEDDED, "icons-dit": EMBEDDED.with_name("base-dit")}
"""The bases that ship with the package, by what `--base` calls them: a UNet, and a transformer in SD3's layout."""

_PARTS = ("tokenizer", "text_encoder", "unet", "transformer", "vae", "scheduler")


@dataclass(frozen=True)
class Card:
    """What a family is recognised by, and how its pipelines are called.

    `attributes`: component of an adapter -> attribute of the pipeline. `guidance`: the argument that takes the guidance
    scale, which is off at `guidance_off` there. `negative_prompt`: whether one is read; `empty_negative`: what stands
    for none where the pipeline guides only with one. `prompt_tokens`: how many the pipeline reads at most. `always`:
    arguments that every call gets, `area`: the one that takes the number of pixels, both where the pipeline has them.
    `from_text`: whether it makes images from a prompt alone.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    attributes: Mapping[str, str]
    guidance: str = "guidance_scale"
    guidance_off: float = 1.0
    negative_prompt: bool = True
    empty_negative: str = ""
    prompt_tokens: int = 256
    always: Mapping[str, Any] = field(default_factory=dict)
    area: str = ""
    from_text: bool = True


@dataclass(frozen=True)
class Traits:
    """What a loaded base is used with when nothing else is said, and what adapter files tell other programs about it.

    `resolution`: pixels. `size_step`: sides of training images are multiples of it.
    `timestep_shift`: which noise is learned, as `--timestep-shift` has it. `tags`: metadata keys of files.
    `source`: what sees the source image of a base that edits: its denoiser alone (`latents`) or its text encoder too
    (`latents and text`), which then makes no image without one. `always`: what every call of the pipeline gets, beside
    the card's.
    """

    resolution: int
    size_step: int
    steps: int
    guidance_scale: float
    learning_rate: float
    train_steps: int
    batch_size: int
    timestep_shift: float
    tags: Mapping[str, str]
    source: Literal["", "latents", "latents and text"] = ""
    always: Mapping[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """One kind of base model, loaded and frozen.

    Pixels are in [-1, 1]; latents are scaled as the denoiser wants them. `components`: component -> module, with the
    denoiser first. `pipeline`: the diffusers pipeline of the same modules.
    """

    card: ClassVar[Card]
    components: Mapping[str, nn.Module]
    objective: Objective
    traits: Traits
    pipeline: Any

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device) -> Family:
        """Load a diffusers folder."""
        ...

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits of a pipeline; `path`: the folder that it, or its configs, came from."""
        ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode pixels (batch, 3, height, width) to latents (batch, channels, height / f, width / f), float32."""
        ...

    def encode_prompt(self, prompts: list[str]) -> dict[str, Any]:
        """Encode prompts as the pipeline does: tensors with the batch first, or lists of texts of different lengths."""
        ...

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Run the denoiser on `noisy` (batch, channels, height, width) at `t` (batch,).

        `conditioning`: what `encode_prompt` returned; `source` (batch, channels, height, width), latents of the images
        to edit, where `traits.source` says so; and in training `sizes` (batch, 6): height and width of the original
        image, top and left of the crop, height and width of what is left; most families have no use for them.
        """
        ...


class ReadsSource(Family, Protocol):
    """A family whose text encoder sees the image to edit."""

    def encode_prompt(self, prompts: list[str], sources: Tensor | None = None) -> dict[str, Any]:
        """Encode prompts, each with its source: pixels (batch, 3, height, width) in [-1, 1]."""
        ...


def place_of(base: str | Path | None) -> Path:
    """Return where a base lies: what `SHIPPED` has of this name, or the path (or hub name) itself."""
    return SHIPPED.get(str(base or ""), Path(base or ""))


def load_family(
    base: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
    parts: str | Path | None = None,
    quantize: str = "no",
) -> Family:
    """Load a base model: a diffusers folder, a hub name, a single file, or an embedded one (None, `icons-dit`).

    `parts`: for a file, the diffusers folder with what it does not hold; see `models.single`. `quantize`: see
    `models.quantized`; such a base is loaded in main memory first.
    Raises `ModelError` when it is missing, incomplete, or of no known family.
    """
    path, place = place_of(base), device
    if quantize != "no":
        require_library(quantize)
        place = torch.device("cpu")

    def prepared(load: Callable[[torch.device], Family]) -> Family:
        return _prepared(path, lambda: _quantized(load(place), quantize, device))

    if path.is_file():
        from vislora.models.single import load_file

        return prepared(partial(load_file, path, Path(parts) if parts else None, dtype))
    if parts:
        raise ModelError(f"--base-parts is for a base in one file; {path} is none")
    index = read_index(path)
    class_name = index["_class_name"]
    for family in FAMILIES.values():
        if class_name in family.card.pipelines:
            _require_parts(path, index)
            return prepared(partial(family.load, path, dtype))
    known = ", ".join(name for family in FAMILIES.values() for name in family.card.pipelines)
    raise ModelError(f"base {path} is a {class_name}, which no family of vislora handles; known: {known}")


def components_of(pipeline: Any) -> tuple[str | None, dict[str, nn.Module]]:
    """Return (family name or None, component -> module) of a diffusers pipeline or of any bare module.

    A bare module is the component `denoiser`. A pipeline of no known family has its UNet or transformer there.
    Raises `ModelError` when there is no module to put an adapter on.
    """
    if isinstance(pipeline, nn.Module):
        return None, {"denoiser": pipeline}
    for family in FAMILIES.values():
        found = {name: getattr(pipeline, attribute, None) for name, attribute in family.card.attributes.items()}
        if _is_family(family.card, pipeline, found["denoiser"]):
            return family.card.name, {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    for attribute in ("unet", "transformer"):
        if isinstance(getattr(pipeline, attribute, None), nn.Module):
            return None, {"denoiser": getattr(pipeline, attribute)}
    raise ModelError(f"{type(pipeline).__name__} is neither a module nor a pipeline with a unet or transformer")


def read_traits(
    path: Path, pipeline: Any, resolution: int, size_step: int, tags: Mapping[str, str], **defaults: Any
) -> Traits:
    """Return the traits of a base: its pipeline's, then `defaults`, then what `vislora.json` in its folder says.

    Raises `ModelError` for one that is no JSON object, or that holds a setting which is not known or out of its range.
    """
    signature = inspect.signature(type(pipeline).__call__).parameters
    values: dict[str, Any] = {
        "resolution": resolution,
        "size_step": size_step,
        "steps": 20,
        "guidance_scale": signature["guidance_scale"].default,
        "learning_rate": 1e-4,
        "train_steps": 1500,
        "batch_size": 1,
        "timestep_shift": 1.0,
        **defaults,
    }
    return Traits(**{**values, **_own_traits(path / "vislora.json")}, tags=tags)


def _own_traits(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return OwnDefaults.of(_read_object(path)).model_dump(exclude_none=True)
    except ConfigError as error:
        raise ModelError(f"{path}: {'; '.join(error.problems)}") from None


def absent_parts(path: Path) -> dict[str, None]:
    """Return the parts that the index of a folder says to be left out: diffusers wants to be told so again."""
    index = read_index(path) if path.is_dir() else {}
    return {name: None for name, value in index.items() if value == [None, None]}


def read_index(path: Path) -> dict[str, Any]:
    """Return what model_index.json says: `_class_name`, and (library, class) of every part."""
    index = path / "model_index.json"
    if not path.exists():
        index = _from_hub(path)
    elif not index.is_file():
        raise ModelError(f"base {path} has no model_index.json: give the folder of a diffusers pipeline")
    found = _read_object(index)
    if not isinstance(found.get("_class_name"), str):
        raise ModelError(f"{index} is damaged (it names no pipeline)")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged (it should be a JSON object)")
    return found


def _require_parts(path: Path, index: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a part without a folder; transformers makes up an empty tokenizer for a missing one."""
    used = [
        name
        for name, value in index.items()
        if isinstance(value, list) and value != [None, None] and name.startswith(_PARTS)
    ]
    missing = [name for name in used if path.is_dir() and not (path / name).is_dir()]
    if missing:
        raise ModelError(f"base {path} is incomplete: it has no folder {', '.join(missing)}")


def _from_hub(path: Path) -> Path:
    """Fetch the index of a hub name such as `stabilityai/stable-diffusion-3-medium-diffusers`."""
    hint = nearest(str(path), [*SHIPPED])
    missing = f"base '{path}' does not exist{hint}: give a folder, or leave --base out to use the embedded base"
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", ".."):
        raise ModelError(missing)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(path), "model_index.json", local_files_only=is_offline()))
    except Exception as error:
        raise ModelError(f"{missing} (as a hub name it cannot be fetched: {type(error).__name__})") from error


def is_offline() -> bool:
    """Ask for the hub's address: without a network the hub's own client retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        return not socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname or "", 443)
    except OSError:
        return True


def _prepared(path: Path, load: Callable[[], Family]) -> Family:
    """Load a base, freeze it, and turn what libraries raise into a `ModelError` of one line."""
    try:
        with quiet():
            loaded = load()
        _require_words(loaded.pipeline)
        loaded.pipeline.set_progress_bar_config(disable=True)
        for module in loaded.components.values():
            module.requires_grad_(False).eval()
        return loaded
    except Exception as error:  # libraries raise nearly every kind of error for a damaged folder
        if isinstance(error, VisloraError) and str(path) in str(error):
            raise ModelError(str(error)) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"base {path} cannot be loaded: {first}") from error


def _quantized(loaded: Family, quantize: str, device: torch.device) -> Family:
    if quantize != "no":
        quantize_base(loaded.pipeline, loaded.card.attributes["denoiser"], quantize, device)
        loaded.pipeline.to(device)
    return loaded


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """Return the tokenizers of a pipeline by its names for them; one inside a processor is taken out."""
    return {
        name: getattr(part, "tokenizer", part)
        for name, part in sorted(pipeline.components.items())
        if name.startswith("tokenizer") and part is not None
    }


def _require_words(pipeline: Any) -> None:
    for name, tokenizer in tokenizers_of(pipeline).items():
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ModelError(f"its {name} knows no words: files are missing in that folder")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' loading bars and notes to developers off the screen; put them back after."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, (level, has_bars) in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            if has_bars:
                logger.enable_progress_bar()


def _is_family(card: Card, pipeline: Any, denoiser: Any) -> bool:
    """A family is its denoiser's class and exactly its text encoders: SDXL has a UNet too, but two of them.

    Text encoders that are left out count where the others alone are another family, as those of SDXL's refiner are.
    """
    expected = {attribute for component, attribute in card.attributes.items() if component != "denoiser"}
    parts = {
        name: part for name, part in getattr(pipeline, "components", {}).items() if name.startswith("text_encoder")
    }
    plain = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps it
    there = {name for name, part in parts.items() if part is not None}
    return type(plain).__name__ == card.denoiser and expected in (set(parts), there)
