"""Layer names of Stable Diffusion 1.x and 2.x: diffusers UNet2DConditionModel, and the UNet of the original (LDM, SGM).

    lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0   (sd-scripts networks/lora.py)
    diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k           -> down_blocks.1.attentions.0. ...
    lora_te_text_model_encoder_layers_0_mlp_fc1

The original counts through its blocks, which have two layers on the way down and three on the way up:
`input_blocks.3b+l+1` is layer l of down block b, `output_blocks.3b+l` that of up block b; in it 0 is the resnet, 1 its
attention. UNets with another number of layers have no original names; kohya's files of SD do not need them.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.table import FamilyNames, NameTable, Numbers, Renumber, Row, Sign
from vislora.formats.names.text import CLIP

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "norm_q", "norm_k", "group_norm")
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_TOP = (
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("conv_norm_out", "out.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("time_embedding.cond_proj", ""),
    ("encoder_hid_proj", ""),
)
CLASS_EMBEDDING = (
    Row("class_embedding", "label_emb"),
    Row("class_embedding.linear_1", "label_emb.0.0"),
    Row("class_embedding.linear_2", "label_emb.0.2"),
)
_PER_DOWN, _PER_UP, _BLOCK = 2, 3, 3  # layers in a block of either kind; how far the original counts for a block


def _down(numbers: Numbers) -> Numbers | None:
    block, layer, *rest = numbers
    return (_BLOCK * block + layer + 1, *rest) if layer < _PER_DOWN else None


def _from_down(numbers: Numbers) -> Numbers | None:
    block, layer = divmod(numbers[0] - 1, _BLOCK)
    return (block, layer, *numbers[1:]) if block >= 0 and layer < _PER_DOWN else None


def _up(numbers: Numbers) -> Numbers | None:
    block, layer, *rest = numbers
    return (_BLOCK * block + layer, *rest) if layer < _PER_UP else None


def _from_up(numbers: Numbers) -> Numbers:
    return (*divmod(numbers[0], _BLOCK), *numbers[1:])


def _downsampler(numbers: Numbers) -> Numbers | None:
    block, layer = numbers
    return (_BLOCK * block + _BLOCK,) if layer == 0 else None


def _from_downsampler(numbers: Numbers) -> Numbers | None:
    block, layer = divmod(numbers[0] - 1, _BLOCK)
    return (block, 0) if layer == _BLOCK - 1 else None


def upsampler(bare_blocks: int) -> Renumber:
    """Count upsamplers, which follow the attention: they are 1 in the first `bare_blocks`, that have none, 2 in others.

    Both are read wherever they stand.
    """

    def to_stored(numbers: Numbers) -> Numbers | None:
        block, layer = numbers
        return (_BLOCK * block + _BLOCK - 1, 1 if block < bare_blocks else 2) if layer == 0 else None

    def to_path(numbers: Numbers) -> Numbers | None:
        block, layer = divmod(numbers[0], _BLOCK)
        return (block, 0) if layer == _BLOCK - 1 and numbers[1] in (1, 2) else None

    return Renumber(to_stored, to_path)


def _middle(inner: int) -> Renumber:
    """Count in the middle block: resnet, attention, resnet."""

    def to_path(numbers: Numbers) -> Numbers | None:
        layer, kind = divmod(numbers[0], 2)
        return (layer, *numbers[1:]) if kind == inner else None

    return Renumber(lambda numbers: (2 * numbers[0] + inner, *numbers[1:]), to_path)


def unet_rows(bare_blocks: int) -> Iterator[Row]:
    """Yield every layer that a UNet2DConditionModel can have, without class or additional embeddings.

    bare_blocks: how many of the first up blocks have no attention.
    """
    yield from (Row(path, stored) for path, stored in _TOP)
    down, up = Renumber(_down, _from_down), Renumber(_up, _from_up)
    yield from _layers("down_blocks.{}.", "input_blocks.{}.0", "input_blocks.{}.1", (down, down))
    yield from _layers("mid_block.", "middle_block.{}", "middle_block.{}", (_middle(0), _middle(1)))
    yield from _layers("up_blocks.{}.", "output_blocks.{}.0", "output_blocks.{}.1", (up, up))
    downsampler = Renumber(_downsampler, _from_downsampler)
    yield Row("down_blocks.{}.downsamplers.{}.conv", "input_blocks.{}.0.op", renumber=downsampler)
    yield Row("up_blocks.{}.upsamplers.{}.conv", "output_blocks.{}.{}.conv", renumber=upsampler(bare_blocks))


def _layers(block: str, resnet: str, attention: str, renumber: tuple[Renumber, Renumber]) -> Iterator[Row]:
    for path, stored in _RESNET:
        yield Row(f"{block}resnets.{{}}.{path}", f"{resnet}.{stored}", renumber=renumber[0])
    for name in _attention_layers():
        yield Row(f"{block}attentions.{{}}.{name}", f"{attention}.{name}", renumber=renumber[1])


def _attention_layers() -> Iterator[str]:
    yield from ("proj_in", "proj_out", "norm", *_ATTENTION)
    inner = "transformer_blocks.{}"
    yield from (f"{inner}.{attn}.{name}" for attn in ("attn1", "attn2") for name in _ATTENTION)
    yield from (f"{inner}.{name}" for name in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"))


SD = FamilyNames(
    family="sd",
    tables={
        "denoiser": NameTable((*unet_rows(bare_blocks=1), *CLASS_EMBEDDING)),
        "te:clip_l": CLIP,
    },
    flat_prefixes={"denoiser": "lora_unet_", "te:clip_l": "lora_te_"},
    folders={"denoiser": "unet", "te:clip_l": "text_encoder"},
    flattened=frozenset({"te:clip_l"}),
    flat_from="path",
    signs=(
        Sign(r".*\.attn2\.to_[kv]", (768, 1024)),
        Sign(r"(down_blocks\.0|up_blocks\.3)\.attentions\..*", (320, 1280)),
    ),
    versions=("sd_v1", "sd_v2", "sd_1", "sd_2", "stable-diffusion-v"),
)
