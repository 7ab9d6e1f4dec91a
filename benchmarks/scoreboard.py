"""Who reads which adapter file right? Files in the wild, of known effect, given to diffusers and to vislora.

A module is right when its change of the weight, applied to a random vector, is the true one to 1e-4. The last column
converts the file with vislora to diffusers' format (`--as lora`) and lets diffusers read that.

Run: python benchmarks/scoreboard.py [PART OF A CASE'S NAME]      (about a minute; no network, no base weights)
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging
from wild_files import CASES, Effect, WildFile

import vislora
from vislora import formats

Probe = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Layers = dict[tuple[str, str], Probe]


class Refused(Exception):
    """The file holds something that diffusers' format cannot hold; nothing was written."""


@dataclass
class Score:
    """How many of a file's modules came out right, wrong or not at all, and an error's first line if there was one."""

    right: int = 0
    wrong: int = 0
    missing: int = 0
    error: str = ""

    def __str__(self) -> str:
        counts = f"{self.right}/{self.right + self.wrong + self.missing}"
        wrong = f", {self.wrong} wrong" if self.wrong else ""
        return f"{counts}{wrong}{f' ({self.error})' if self.error else ''}"


def score(made: WildFile, read: Callable[[], Layers]) -> Score:
    """Compare what a reader makes of a file with the truth."""
    try:
        layers = read()
    except Exception as error:  # any failure of a peer is a result here
        return Score(missing=len(made.effects), error=type(error).__name__)
    found = Score()
    for effect in made.effects:
        probe = layers.get((effect.component, effect.path))
        if probe is None:
            found.missing += 1
        elif is_right(effect, probe):
            found.right += 1
        else:
            found.wrong += 1
    return found


def is_right(effect: Effect, probe: Probe) -> bool:
    """Say whether a layer's change is the true one, its magnitude included."""
    vector = torch.randn(effect.down.flatten(1).shape[1], generator=torch.Generator().manual_seed(1))
    expected = effect.probe(vector)
    found, magnitude = probe(vector)
    if (magnitude is None) != (effect.magnitude is None) or found.shape != expected.shape:
        return False
    if magnitude is not None and effect.magnitude is not None and not torch.allclose(magnitude, effect.magnitude):
        return False
    return bool(torch.linalg.vector_norm(found - expected) <= 1e-4 * torch.linalg.vector_norm(expected))


def read_with_vislora(path: Path) -> Layers:
    """Return what vislora makes of every layer."""
    return {(module.component, module.path or ""): probe_of(module) for module in formats.load(path).modules}


def probe_of(module: formats.AdapterModule) -> Probe:
    """Return what applies the change that vislora read."""

    def probe(vector: Tensor) -> tuple[Tensor, Tensor | None]:
        magnitude = None if module.magnitude is None else module.magnitude.flatten()
        if module.tensors.keys() == {"up", "down"}:  # without the dense delta, of which FLUX has gigabytes
            return Effect("", "", module.tensors["up"], module.tensors["down"], module.scale).probe(vector), magnitude
        return module.direction().flatten(1) @ vector.double(), magnitude

    return probe


def read_with_diffusers(path: Path, kind: str) -> Layers:
    """Let diffusers load a file into a model of its real size, and return what PEFT would add to every layer."""
    from peft.tuners.lora import LoraLayer

    pipeline, components = PIPELINES[kind]()
    for model in components.values():
        give_weights_without_memory(model)
    pipeline.load_lora_weights(str(path), adapter_name="a", low_cpu_mem_usage=True)
    layers: Layers = {}
    for component, model in components.items():
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and "a" in layer.lora_A:
                prefix = "text_model." if component == "te:clip_l" and not name.startswith("text_model") else ""
                layers[component, f"{prefix}{name}"] = peft_probe(layer)
    return layers


def give_weights_without_memory(model: torch.nn.Module) -> None:
    """Replace the weights, which are on the meta device, by zeros that share one number: PEFT needs a real device."""
    for layer in model.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(weight.shape)
            setattr(layer, name, torch.nn.Parameter(zeros, requires_grad=False))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def peft_probe(layer: Any) -> Probe:
    """Return what applies the change that PEFT holds."""
    down, up = layer.lora_A["a"].weight.detach(), layer.lora_B["a"].weight.detach()
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    magnitude = magnitudes["a"].weight.detach().flatten() if "a" in magnitudes else None
    scale = layer.scaling["a"]

    def probe(vector: Tensor) -> tuple[Tensor, Tensor | None]:
        return Effect("", "", up, down, scale).probe(vector), magnitude

    return probe


def bare(pipeline: type, **parts: Any) -> Any:
    """Make a pipeline of which only some parts are there."""
    import inspect

    names = list(inspect.signature(pipeline).parameters)
    missing = {name: None for name in names if name not in parts and "requires" not in name and "force" not in name}
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in names else {}
    return pipeline(**parts, **{name: value for name, value in missing.items() if name in COMPONENT_NAMES}, **extra)


COMPONENT_NAMES = (
    *("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    *("unet", "transformer", "scheduler", "safety_checker", "feature_extractor", "image_encoder"),
)


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of SD 1.5 at its real size, and its components by our names."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return bare(StableDiffusionPipeline, unet=unet, text_encoder=clip), {"denoiser": unet, "te:clip_l": clip}


def stable_diffusion_xl() -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of SDXL at its real size, and its components."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return bare(StableDiffusionXLPipeline, unet=unet, text_encoder=clip), {"denoiser": unet, "te:clip_l": clip}


def stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of SD3 medium at its real size, and its components."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.device("meta"):
        model = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
    return bare(StableDiffusion3Pipeline, transformer=model), {"denoiser": model}


def flux() -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of FLUX.1 at its real size but for a narrow T5, and its components."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        t5 = T5EncoderModel(T5Config(d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=64))
    return bare(FluxPipeline, transformer=model, text_encoder_2=t5), {"denoiser": model, "te:t5": t5}


PIPELINES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux": flux}


def converted(path: Path) -> Path:
    """Convert a file to diffusers' format, which holds plain LoRA alone; a loss is an error."""
    report = vislora.convert(path, path.with_name("converted.safetensors"), "diffusers", as_="lora", overwrite=True)
    if not report.ok:
        raise Refused("; ".join(report.lost + report.problems))
    return report.destination


def row(name: str, make: Callable[[], WildFile], folder: Path) -> tuple[str, ...]:
    """Return one line of the scoreboard."""
    made = make()
    path = folder / "wild.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in made.tensors.items()}, path, made.metadata)
    peer = score(made, lambda: read_with_diffusers(path, made.pipeline))
    own = score(made, lambda: read_with_vislora(path))
    through = score(made, lambda: read_with_diffusers(converted(path), made.pipeline))
    return name, str(len(made.effects)), str(peer), str(own), str(through)


def main(only: str = "") -> None:
    """Print the scoreboard as a Markdown table."""
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    print("| file | layers | diffusers reads | vislora reads | vislora converts, diffusers reads |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in CASES.items():
            if only.lower() in name.lower():
                print("| " + " | ".join(row(name, make, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
