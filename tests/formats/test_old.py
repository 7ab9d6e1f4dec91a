"""diffusers' files of 2023: the names of then, made here from a model's layers, and diffusers itself as the judge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.formats.test_peers import assert_same, models, peer_deltas, pipeline  # noqa: F401
from vislora import formats
from vislora.algebra.compare import compare

OLD_UNET = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
OLD_CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def attention_layers(model: nn.Module) -> dict[str, nn.Linear]:
    wanted = (*OLD_UNET, *OLD_CLIP)
    return {path: item for path, item in model.named_modules() if "attn" in path and path.endswith(wanted)}


def halves(name: str, layer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Make a rank 3 update for a layer under `name`.down.weight and `name`.up.weight, as diffusers' LoRA layers had."""
    out, *rest = layer.weight.shape
    down, up = (3, *rest), (out, 3, *[1] * (len(rest) - 1))
    return {
        f"{name}.down.weight": torch.randn(down, generator=generator),
        f"{name}.up.weight": torch.randn(up, generator=generator),
    }


def old_unet_name(path: str) -> str:
    """down_blocks...attn1.to_out.0 -> down_blocks...attn1.processor.to_out_lora"""
    owner, _, layer = path.partition(".to_")
    return f"{owner}.processor.{OLD_UNET[f'to_{layer}']}_lora"


def clip_path(path: str) -> str:
    return path if path.startswith("text_model.") else f"text_model.{path}"


def old_file(unet: nn.Module, clip: nn.Module | None, prefix: str = "unet.") -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for path, layer in attention_layers(unet).items():
        tensors |= halves(f"{prefix}{old_unet_name(path)}", layer, dice)
    for path, layer in attention_layers(clip).items() if clip is not None else ():
        owner, _, name = clip_path(path).rpartition(".")
        tensors |= halves(f"text_encoder.{owner}.{OLD_CLIP[name]}_lora", layer, dice)
    return tensors


def mid_file(unet: nn.Module, clip: nn.Module) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and "blocks" in path:
            tensors |= halves(f"unet.{path}.lora", layer, dice)
    for path, layer in clip.named_modules():
        if isinstance(layer, nn.Linear):
            tensors |= halves(f"text_encoder.{clip_path(path)}.lora_linear_layer", layer, dice)
    return tensors


def clip_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder.")}


MAKERS = {"diffusers-old": old_file, "diffusers-mid": mid_file}


@pytest.mark.parametrize("name", MAKERS)
def test_diffusers_loads_the_same_file_and_means_the_same(name, pipeline, models, tmp_path):  # noqa: F811
    tensors = MAKERS[name](*models)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = formats.load(tmp_path / "a.safetensors")
    assert (adapter.source.format, adapter.family, adapter.extras) == (name, "sd", {})
    assert 2 * len(adapter.modules) == len(tensors)
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    assert_same(adapter, "denoiser", peer_deltas(pipeline.unet, "a"))
    assert_same(adapter, "te:clip_l", peer_deltas(pipeline.text_encoder, "a"))


def test_files_without_a_prefix_are_the_unets(models, tmp_path):  # noqa: F811
    """`save_attn_procs` wrote them so; today's diffusers loads nothing of such a file and says so in a warning only."""
    save_file(old_file(models[0], None), tmp_path / "a.safetensors")
    save_file(old_file(models[0], None, prefix=""), tmp_path / "b.safetensors")
    prefixed, plain = (formats.load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert compare(prefixed, plain).exact
    assert {item.component for item in plain.modules} == {"denoiser"}


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_they_convert_to_what_is_written_today(to, models, tmp_path):  # noqa: F811
    save_file({**old_file(models[0], None), **clip_of(mid_file(*models))}, tmp_path / "a")
    source = formats.load(tmp_path / "a")
    formats.save(source, tmp_path / "b", to)
    assert compare(source, formats.load(tmp_path / "b")).exact


def test_the_two_forms_in_one_file(models, tmp_path):  # noqa: F811
    """diffusers 0.16 to 0.20 wrote the UNet in the old form and the text encoder in the newer one."""
    old, text = old_file(models[0], None), clip_of(mid_file(*models))
    save_file({**old, **text}, tmp_path / "a.safetensors")
    adapter = formats.load(tmp_path / "a.safetensors")
    assert 2 * len(adapter.modules) == len(old) + len(text)
    assert {item.component for item in adapter.modules} == {"denoiser", "te:clip_l"}


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
PAIR = {"down.weight": torch.ones(2, 8), "up.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        (f"{LAYER}.processor.to_out_lora", f"{LAYER}.processor.to_out_lora.alpha"),
        (f"{LAYER}.to_out.0.lora", f"{LAYER}.to_out.0.lora.alpha"),
        (f"{LAYER}.to_out.0.lora", f"{LAYER}.to_out.0.alpha"),
    ],
)
def test_alphas_are_found_beside_either_name(stem, key, tmp_path):
    tensors = {f"{stem}.{end}": tensor for end, tensor in PAIR.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert formats.load(tmp_path / "a.safetensors").modules[0].scale == 1.0
    save_file({**tensors, key: torch.tensor(5.0)}, tmp_path / "a.safetensors")
    adapter = formats.load(tmp_path / "a.safetensors")
    assert [(item.path, item.alpha, item.scale) for item in adapter.modules] == [
        (f"{LAYER}.to_out.0".removeprefix("unet."), 5.0, 2.5)
    ]
    assert adapter.extras == {}


def test_the_headers_config_gives_alpha_and_rule(tmp_path):
    config = {"unet.lora_alpha": 6, "unet.r": 2, "unet.use_rslora": True}
    tensors = {f"{LAYER}.to_q.lora.{end}": tensor for end, tensor in PAIR.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert formats.load(tmp_path / "a.safetensors").modules[0].scale == pytest.approx(6 / 2**0.5)


def test_dora_of_the_time_between_has_its_magnitude_under_the_layers_name(tmp_path):
    tensors = {f"{LAYER}.to_q.lora.{end}": tensor for end, tensor in PAIR.items()}
    tensors[f"{LAYER}.to_q.lora_magnitude_vector"] = torch.arange(8.0)
    for half, end in (("A", "down"), ("B", "up")):
        tensors[f"{LAYER}.to_k.lora_{half}.weight"] = PAIR[f"{end}.weight"].clone()
    tensors[f"{LAYER}.to_k.lora_magnitude_vector"] = torch.ones(8)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = formats.load(tmp_path / "a.safetensors")
    assert torch.equal(adapter.find(f"{LAYER.removeprefix('unet.')}.to_q").magnitude, torch.arange(8.0))
    assert [item.magnitude is not None for item in adapter.modules] == [True, True]
    assert adapter.extras == {}
