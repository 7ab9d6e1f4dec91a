"""cloneofsimo's numbered layers: the order of modules of 2022, rebuilt here, decides which layer a number means."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.jobs.convert import convert

WIDTHS = (320, 640, 1280)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout()])


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width * 8)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Dropout(), nn.Linear(width * 4, width)])


class Block(nn.Module):
    """BasicTransformerBlock: in 2022 the feed-forward stood between the attentions."""

    def __init__(self, width: int, context: int, later: bool) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width)
        if later:
            self.attn2 = CrossAttention(width, context)
        self.ff = FeedForward(width)
        if not later:
            self.attn2 = CrossAttention(width, context)


class Attention(nn.Module):
    def __init__(self, *sizes) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(sizes[0], sizes[0], 1)
        self.transformer_blocks = nn.ModuleList([Block(*sizes)])


class Level(nn.Module):
    def __init__(self, count: int, *sizes) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(*sizes) for _ in range(count)])


class UNetOf2022(nn.Module):
    """What has to do with attention in SD's UNet. `mid_block = None` is no module, so the middle comes last."""

    def __init__(self, context: int, later: bool) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([])
        self.mid_block = None
        self.up_blocks = nn.ModuleList([])
        self.down_blocks.extend([*(Level(2, width, context, later) for width in WIDTHS), nn.Module()])
        self.mid_block = Level(1, WIDTHS[-1], context, later)
        self.up_blocks.extend([nn.Module(), *(Level(3, width, context, later) for width in reversed(WIDTHS))])


def layers_found(model: nn.Module, classes: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    """Walk as lora_diffusion's `_find_modules` does: ancestors of these classes in order, then linears in each."""
    found = []
    for name, ancestor in model.named_modules():
        if type(ancestor).__name__ in classes:
            found += [(f"{name}.{n}", item) for n, item in ancestor.named_modules() if isinstance(item, nn.Linear)]
    return found


def numbered(prefix: str, layers: list[tuple[str, nn.Linear]], rank: int = 2) -> dict[str, Tensor]:
    """Write as save_safeloras does; a layer's number is in its tensors too."""
    tensors = {}
    for index, (_, layer) in enumerate(layers):
        tensors[f"{prefix}:{index}:up"] = torch.full((layer.out_features, rank), float(index)).half()
        tensors[f"{prefix}:{index}:down"] = torch.ones(rank, layer.in_features).half()
    return tensors


METADATA = {"unet": json.dumps(["GEGLU", "CrossAttention", "Attention"]), "unet:0:rank": "2", "<s1>": "<embed>"}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sd1 later"])
def model(request):
    with torch.device("meta"):
        return UNetOf2022(1024 if request.param == "sd2" else 768, later="later" in request.param)


@pytest.fixture(scope="module")
def clip():
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))


def test_every_number_leads_to_the_layer_it_was_given_for(model, clip, tmp_path):
    unet_layers = layers_found(model, ("CrossAttention", "GEGLU"))
    clip_layers = layers_found(clip, ("CLIPAttention",))
    assert (len(unet_layers), len(clip_layers)) == (144, 48)
    tensors = numbered("unet", unet_layers) | numbered("text_encoder", clip_layers) | {"<s1>": torch.randn(768)}
    save_file(tensors, tmp_path / "a.safetensors", METADATA)
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.source.format, read.family, read.extras, len(read.modules)) == ("cloneofsimo", "sd", {}, 192)
    for component, layers in (("denoiser", unet_layers), ("te:clip_l", clip_layers)):
        expected = [name if component == "denoiser" else f"text_model.{name}" for name, _ in layers]
        modules = [item for item in read.modules if item.component == component]
        by_number = sorted(modules, key=lambda item: float(item.tensors["up"][0, 0]))
        assert [item.path for item in by_number] == expected
    assert {item.scale for item in read.modules} == {1.0}
    assert torch.equal(read.embeddings["<s1>"]["emb_params"], tensors["<s1>"])
    assert read.metadata == METADATA


def test_the_layers_are_those_of_the_real_unet(model, tmp_path):
    tensors = numbered("unet", layers_found(model, ("CrossAttention", "GEGLU")))
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    context = read.find(f"{MID}.attn2.to_k").shape[1]
    with torch.device("meta"):
        real = dict(UNet2DConditionModel(cross_attention_dim=context).named_modules())
    assert {item.path: item.shape for item in read.modules} == {
        item.path: tuple(real[item.path].weight.shape) for item in read.modules
    }


MID = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def tensors():
    with torch.device("meta"):
        model = UNetOf2022(768, later=False)
    return numbered("unet", layers_found(model, ("CrossAttention", "GEGLU")))


def test_conversion_keeps_the_embedding_in_kohya_files_only(tensors, tmp_path):
    save_file({**tensors, "<s1>": torch.randn(768)}, tmp_path / "a.safetensors", METADATA)
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya").ok
    stored = load_file(tmp_path / "b.safetensors")["bundle_emb.<s1>.emb_params"]
    assert torch.equal(stored, load_file(tmp_path / "a.safetensors")["<s1>"])
    report = convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert report.lost == ["1 embeddings, which have no place in a diffusers adapter (first: <s1>)"]


def test_lists_in_a_pickle(tensors, clip, tmp_path):
    """save_lora_weight: [up0, down0, up1, ...] in half precision, the text encoder and tokens in files beside it."""
    text = numbered("text_encoder", layers_found(clip, ("CLIPAttention",)))
    save_file({**tensors, **text}, tmp_path / "whole.safetensors")
    token = torch.randn(768)
    torch.save(as_list(tensors, "unet"), tmp_path / "a.pt")
    torch.save(as_list(text, "text_encoder"), tmp_path / "a.text_encoder.pt", _use_new_zipfile_serialization=False)
    torch.save({"krk": token}, tmp_path / "a.ti.pt")
    read = formats.load(tmp_path / "a.pt", allow_pickle=True)
    assert read.source.format == "cloneofsimo"
    assert torch.equal(read.embeddings.pop("krk")["emb_params"], token)
    assert compare(formats.load(tmp_path / "whole.safetensors"), read).exact
    alone = formats.load(tmp_path / "a.text_encoder.pt", allow_pickle=True)
    assert {item.component for item in alone.modules} == {"te:clip_l"}


def as_list(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    count = len(tensors) // 2
    return [tensors[f"{prefix}:{index}:{half}"] for index in range(count) for half in ("up", "down")]


def without(tensors, *keys):
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


WRONG = {
    "too few": (lambda all: without(all, "unet:143:up", "unet:143:down"), "there are 143, SD's UNet has 144"),
    "a gap": (lambda all: without(all, "unet:7:up", "unet:7:down"), "'unet:7:up' is missing"),
    "half a layer": (lambda all: without(all, "unet:7:down"), "'unet:7:down' is missing"),
    "a width of no level": (
        lambda all: {**all, "unet:60:up": torch.ones(7, 2)},
        r"'unet:60' is \[7, 768\], not \[1280, 768\]",
    ),
    "no order known": (
        lambda all: {**all, "unet:4:up": all["unet:5:up"].clone(), "unet:5:up": all["unet:4:up"].clone()},
        r"'unet:5' is \[2560, 320\], not \[320, 320\]|'unet:4' is \[320, 320\], not \[2560, 320\]",
    ),
    "convolutions": (
        lambda all: {**all, "unet:0:up": torch.ones(4, 2, 1, 1), "unet:0:down": torch.ones(2, 4, 3, 3)},
        "no linear layer's",
    ),
    "another text encoder": (
        lambda all: {f"text_encoder:{n}:{half}": torch.ones(2, 2) for n in range(8) for half in ("up", "down")},
        "there are 8, SD's text encoders have 48 or 92",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_lists_are_refused_with_the_reason(name, tensors, tmp_path):
    change, message = WRONG[name]
    save_file(change(tensors), tmp_path / "a.safetensors", {"unet": '["ResnetBlock2D"]'})
    with pytest.raises(AdapterFileError, match=message) as caught:
        formats.load(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)


def test_the_classes_of_the_metadata_are_told(tensors, tmp_path):
    save_file(
        without(tensors, "unet:143:up", "unet:143:down"), tmp_path / "a.safetensors", {"unet": '["ResnetBlock2D"]'}
    )
    with pytest.raises(AdapterFileError, match=r'in modules of class \["ResnetBlock2D"\]'):
        formats.load(tmp_path / "a.safetensors")
