"""Which layers get an adapter: patterns over module paths, with rank, alpha and algorithm per pattern, and presets.

A pattern is a glob over the dotted path (`*.attn2.to_k`) or, after `re:`, a regular expression that matches all of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vislora.algorithms.base import LayerSpec
from vislora.errors import ConfigError, listed, nearest
from vislora.globs import matches
from vislora.inject.fused import FUSED, can_fuse, idle_layers

_ATTENTION = (
    r"to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv(_mlp_proj)?|"  # diffusers; FLUX.2 has both in one layer
    r"[qkv]_proj|out_proj|o_proj|"  # CLIP, SigLIP, DINO, LLMs
    r"query|key|value|attention\.output\.dense|attention\.o_proj|qkv|attn\.proj|"  # ViT, Swin, timm
    r"SelfAttention\.[qkvo]|EncDecAttention\.[qkvo]"  # T5
)
_FEED_FORWARD = (
    r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|(?<=\.)proj_(in|out)|"  # diffusers; at the top it is the model's output
    r"ff(_context)?\.(linear_[12]|out_projection)|feed_forward\.(linear_|w)[123]|"  # AuraFlow; Lumina 2, Z-Image
    r"ff(_context)?\.linear_(in|out)|(img|txt)_mlp\.net\.(0\.proj|2)|"  # FLUX.2; Qwen-Image
    r"ff\.conv_(inverted|point)|"  # Sana
    r"mlp\.fc[12]|intermediate\.dense|\d+\.output\.dense|gate_proj|up_proj|down_proj|"  # transformers
    r"DenseReluDense\.w[io](_[01])?"  # T5
)
_CONV = (
    r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.\d+\.conv|"
    r"(norm|norm1|norm1_context)\.linear|"
    r"(img|txt)_mod\.1|adaLN_modulation\.0|blocks\.\d+\.adaLN_modulation\.1|"  # Qwen-Image; Z-Image; Peebles and Xie
    r"(double|single)_stream_modulation(_img|_txt)?\.linear"  # FLUX.2
)

PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (rf"re:(.*\.)?({_ATTENTION})",),
    "attention-ff": (rf"re:(.*\.)?({_ATTENTION}|{_FEED_FORWARD})",),
    "all": (rf"re:(.*\.)?({_ATTENTION}|{_FEED_FORWARD}|{_CONV})",),
    "every-layer": ("*",),
    "none": (),
}
"""attention; attention + feed-forward; those and the convs of a UNet (a DiT's modulation); every layer there is."""


@dataclass(frozen=True)
class Target:
    """A pattern and what its layers get. `rank` 0 leaves the layers out; `alpha` None means alpha = rank.

    learning_rate: a peak of their own, None where they have that of all.
    """

    pattern: str
    rank: int
    alpha: float | None = None
    algorithm: str = "lora"
    learning_rate: float | None = None


def select(model: nn.Module, targets: Sequence[Target], preset: str, default: Target) -> dict[str, Target]:
    """Return the target of every chosen layer, keyed by path in module order.

    The first pattern of `targets` that matches a path decides; what none matches falls to `preset` with `default`'s
    rank, alpha and algorithm. Raises `ConfigError` when a pattern matches no adaptable layer, or nothing is chosen.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset '{preset}'{nearest(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    paths = adaptable(model)
    _require_matches(targets, paths)
    patterns = PRESETS[preset]
    chosen: dict[str, Target] = {}
    for path in paths:
        target = next((item for item in targets if matches(item.pattern, path)), None)
        if target is None and any(matches(pattern, path) for pattern in patterns):
            target = default
        if target is not None and target.rank > 0:
            chosen[path] = target
    if not chosen:
        raise ConfigError(
            listed(
                f"preset '{preset}' and {len(targets)} pattern(s) choose none of the {len(paths)} layers of "
                f"{type(model).__name__}; give a pattern that fits, for example:",
                near_misses("to_q", paths),
            )
        )
    return chosen


@dataclass(frozen=True)
class Index:
    """What adapters are about in a model, by path. Paths are the model's own, whatever `torch.compile` wrapped.

    layers: every layer that an adapter works on, once; left out are layers whose weights their parent reads itself,
    without calling them (the output projection of `nn.MultiheadAttention`, the linears of the fast path of
    `nn.TransformerEncoderLayer`), and fused projections out of use: an adapter there has no effect. norms: those with a
    weight per channel, which only take what a file holds for them. aliases: further paths of layers that are at several
    places, each with its path in `layers`. attentions: modules whose projections diffusers may fuse.
    """

    layers: Mapping[str, nn.Module]
    norms: Mapping[str, nn.Module]
    aliases: Mapping[str, str]
    attentions: Mapping[str, nn.Module]


def index(model: nn.Module) -> Index:
    """Return the index of `model`, from one walk through its modules."""
    everywhere = [(path, module) for path, module in walk(unwrapped(model)) if path]
    attentions = {path: module for path, module in everywhere if can_fuse(module)}
    bypassed = {
        id(child)
        for module in [unwrapped(model), *(module for _, module in everywhere)]
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        for child in module.modules()
    }
    for attention in attentions.values():
        bypassed |= {id(attention._modules[name]) for name in idle_layers(attention) & FUSED.keys()}
    first: dict[int, str] = {}
    layers, norms, aliases = {}, {}, {}
    for path, module in everywhere:
        if id(module) in first:
            aliases[path] = first[id(module)]
        elif LayerSpec.of(module) is not None and id(module) not in bypassed:
            first[id(module)] = path
            layers[path] = module
        elif LayerSpec.of_norm(module) is not None:
            norms[path] = module
    return Index(layers, norms, aliases, attentions)


def adaptable(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return every layer that an adapter works on, by path, each layer once; see `Index`."""
    return index(model).layers


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its path, at each of its places, parents first; `named_modules` is slow in deep trees."""
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        yield (plain_path(path) if "_orig_mod" in path else path), module
        prefix = f"{path}." if path else ""
        children = [(f"{prefix}{name}", child) for name, child in module._modules.items() if child is not None]
        pending += reversed(children)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module itself when `torch.compile` returned `model`."""
    return getattr(model, "_orig_mod", model)


def is_compiled(model: nn.Module) -> bool:
    """Say whether `torch.compile` made something of `model` or of a part of it."""
    if unwrapped(model) is not model:
        return True
    return any(
        "_orig_mod" in path or getattr(module, "_compiled_call_impl", None) is not None
        for path, module in model.named_modules()
    )


def plain_path(path: str) -> str:
    """Return `path` without the levels that `torch.compile` puts in."""
    return path.replace("_orig_mod.", "").removesuffix("._orig_mod")


def near_misses(pattern: str, paths: Iterable[str], count: int = 5) -> list[str]:
    """Return the paths most like `pattern`, compared by their last parts first, one for each kind of layer."""
    wanted = pattern.removeprefix("re:").replace("*", "").strip(".")
    by_kind: dict[str, str] = {}
    for path in paths:
        by_kind.setdefault(re.sub(r"\.\d+(?=\.|$)", ".0", path), path)
    tail = wanted.count(".") + 1

    def likeness(path: str) -> float:
        end = ".".join(path.split(".")[-tail:])
        return difflib.SequenceMatcher(None, wanted, end).ratio()

    return sorted(by_kind.values(), key=likeness, reverse=True)[:count]


def _require_matches(targets: Sequence[Target], paths: Mapping[str, nn.Module]) -> None:
    problems = []
    for target in targets:
        if not any(matches(target.pattern, path) for path in paths):
            near = ", ".join(near_misses(target.pattern, paths)) or "none"
            problems.append(f"pattern '{target.pattern}' matches no layer; near misses: {near}")
    if problems:
        raise ConfigError(problems)
