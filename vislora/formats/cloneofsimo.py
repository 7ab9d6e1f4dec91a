"""cloneofsimo/lora files of 2022: layers are counted, not named. Scale 1; read only.

    unet:4:up           (out, rank)   the fifth layer of the UNet that it replaced
    text_encoder:0:down (rank, in)

Spec: cloneofsimo/lora lora_diffusion/lora.py (save_safeloras; save_lora_weight's lists [up, down, up, ...] get the same
keys here). Layers stand in the order of their modules: down, up and middle blocks; in a transformer block of that time
attn1 q k v out, the GEGLU, attn2 q k v out; in a CLIP attention k v q out. diffusers soon moved the GEGLU behind attn2.
Its output is 8 times its input, which no other layer's is: so the shapes say which order it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from vislora.errors import AdapterFileError
from vislora.formats.contract import Format
from vislora.formats.parsed import ParsedModule, Part, module_of

_KEY = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,4}):(up|down)")
_COMPONENTS = {"unet": "denoiser", "text_encoder": "te:clip_l"}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_SELF, _CROSS = (tuple(f"{attn}.{name}" for name in _ATTENTION) for attn in ("attn1", "attn2"))
_GEGLU = ("ff.net.0.proj",)
_ORDERS = (_SELF + _GEGLU + _CROSS, _SELF + _CROSS + _GEGLU)
# the attentions of SD 1.x and 2.x, each with the level whose width it has
_BLOCKS = (
    *((f"down_blocks.{level}.attentions.{number}", level) for level in range(3) for number in range(2)),
    *((f"up_blocks.{3 - level}.attentions.{number}", level) for level in (2, 1, 0) for number in range(3)),
    ("mid_block.attentions.0", 2),
)
_CLIP_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")
# layers of SD 1's text encoder, and of SD 2's without or with its last
_CLIP_DEPTHS = (12, 23, 24)

Halves = dict[str, str]
Shape = tuple[int, int]


def claims(key: str) -> bool:
    """Say whether a key is `unet:0:up` or like it."""
    return _KEY.fullmatch(key) is not None


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Find the layer of every number. Raises `AdapterFileError` when numbers or shapes are not those of SD."""
    lists: dict[str, dict[int, Halves]] = {}
    for key in keys:
        found = _KEY.fullmatch(key)
        if found is not None:
            lists.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = key
    return [module for name, layers in lists.items() for module in _modules(part, name, layers)]


def _modules(part: Part, name: str, layers: dict[int, Halves]) -> Iterator[ParsedModule]:
    shapes = [_shape(part, name, index, layers.get(index, {})) for index in range(max(layers) + 1)]
    paths = _unet_paths(shapes) if name == "unet" else _clip_paths(shapes)
    if isinstance(paths, str):
        said = part.header.metadata.get(name)
        classes = f"; they are in modules of class {said}" if said else ""
        raise AdapterFileError(f"'{name}:0' to '{name}:{len(shapes) - 1}' are not the layers of SD: {paths}{classes}")
    for index, path in enumerate(paths):
        module = module_of(part, f"{name}:{index}", layers[index])
        module.component, module.path, module.family = _COMPONENTS[name], path, "sd"
        yield module


def _shape(part: Part, name: str, index: int, halves: Mapping[str, str]) -> Shape:
    """Return (out, in) of a layer."""
    for half in ("up", "down"):
        if half not in halves:
            raise AdapterFileError(f"'{name}:{index}:{half}' is missing")
    up, down = (part.header.tensors[halves[half]].shape for half in ("up", "down"))
    if len(up) != 2 or len(down) != 2:
        shown = f"'{halves['up']}' {list(up)} and '{halves['down']}' {list(down)}"
        raise AdapterFileError(f"{shown} are no linear layer's; only those of attention and GEGLU have known places")
    return up[0], down[1]


def _unet_paths(shapes: list[Shape]) -> list[str] | str:
    """Return the path of each layer, or why these are not the layers of a UNet of SD."""
    per_block = len(_ORDERS[0])
    if len(shapes) != per_block * len(_BLOCKS):
        return f"there are {len(shapes)}, SD's UNet has {per_block * len(_BLOCKS)}"
    faults = []
    for order in _ORDERS:
        names = [(f"{block}.transformer_blocks.0.{layer}", level) for block, level in _BLOCKS for layer in order]
        widths = [shapes[per_block * 2 * level][0] for level in range(3)]
        context = shapes[order.index("attn2.to_k")][1]
        wanted = [_wanted(path, widths[level], context) for path, level in names]
        wrong = [index for index, shape in enumerate(shapes) if shape != wanted[index]]
        if not wrong:
            return [path for path, _ in names]
        faults.append((wrong[0], f"'unet:{wrong[0]}' is {list(shapes[wrong[0]])}, not {list(wanted[wrong[0]])}"))
    return max(faults)[1]


def _wanted(path: str, width: int, context: int) -> Shape:
    if path.endswith(_GEGLU):
        return 8 * width, width
    return (width, context) if path.endswith(("attn2.to_k", "attn2.to_v")) else (width, width)


def _clip_paths(shapes: list[Shape]) -> list[str] | str:
    depth, rest = divmod(len(shapes), len(_CLIP_ATTENTION))
    if rest or depth not in _CLIP_DEPTHS:
        return f"there are {len(shapes)}, SD's text encoders have {4 * _CLIP_DEPTHS[0]} or {4 * _CLIP_DEPTHS[1]}"
    width = shapes[0][0]
    wrong = [index for index, shape in enumerate(shapes) if shape != (width, width)]
    if wrong:
        return f"'text_encoder:{wrong[0]}' is {list(shapes[wrong[0]])}, not {[width, width]}"
    layers = (f"text_model.encoder.layers.{index}.self_attn" for index in range(depth))
    return [f"{layer}.{name}" for layer in layers for name in _CLIP_ATTENTION]


CLONEOFSIMO = Format(
    name="cloneofsimo",
    about="cloneofsimo/lora of 2022: numbered layers, or lists in a pickle",
    container="file",
    claims=claims,
    parse=parse,
)
