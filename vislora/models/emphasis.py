"""Parts of a prompt that count for more or less: `(a red hat:1.3)`, also one within another; `\\(` is a parenthesis.

What a text encoder makes of a token is moved away from what it makes of the empty prompt in that place, or towards it:
z0 + w (z - z0), as ComfyUI has it (comfy/sd1_clip.py). A pooled text is that of the prompt without its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislora.errors import ConfigError
from vislora.models.base import Family

READERS = ("CLIPTextModel", "T5EncoderModel", "UMT5EncoderModel")
"""How the classes of text encoders begin that read a prompt as it is, and not within their pipeline's instructions."""
LARGEST = 10.0
_PARTS = re.compile(r"\\[()]|[()]|[^\\()]+|\\")
_NUMBER = r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"
_END = re.compile(rf"{_NUMBER}$")
_WEIGHT = re.compile(rf"\(.*{_NUMBER}\)")


@dataclass(frozen=True)
class Weighed:
    """A prompt without its weights, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        """Say whether all of it counts as it is."""
        return all(weight == 1.0 for weight in self.weights)


def weighed(prompt: str) -> Weighed:
    """Read the weights of a prompt; parentheses without a number at their end are a part of it.

    Raises `ConfigError` for a weight beyond 10 or below -10.
    """
    text, weights, opened = "", [], []
    for part in _PARTS.findall(prompt):
        if part == "(":
            opened.append(len(text))
        start = opened.pop() if part == ")" and opened else None
        end = None if start is None else _END.search(text, start)
        if start is None or end is None:
            added = part.removeprefix("\\") if len(part) == 2 else part
            text += added
            weights += [1.0] * len(added)
            continue
        if not abs(float(end[1])) <= LARGEST:
            raise ConfigError(f"prompt: the weight of '{text[start:]})' is not in -{LARGEST:g} to {LARGEST:g}")
        text = text[:start] + text[start + 1 : end.start()]
        weights = weights[:start] + [float(end[1]) * weight for weight in weights[start + 1 : end.start()]]
    return Weighed(text, tuple(weights))


def has_weights(prompt: str) -> bool:
    """Say whether a prompt looks as if it had weights."""
    return _WEIGHT.search(prompt) is not None


def reads_weights(family: Family) -> bool:
    """Say whether prompts for this base may have weights; others read them as text."""
    return all(type(encoder).__name__.startswith(READERS) for encoder, _ in _encoders(family))


def as_read(family: Family, prompts: Sequence[str]) -> list[Weighed]:
    """Return what this base is to read, and how it is weighed. Raises `ConfigError` as `weighed` does."""
    if reads_weights(family):
        return [weighed(prompt) for prompt in prompts]
    return [Weighed(prompt, ()) for prompt in prompts]


@contextmanager
def emphasised(family: Family, prompts: Sequence[Weighed], negative: Sequence[Weighed] = ()) -> Iterator[None]:
    """Have the text encoders weigh the prompts of a batch, and its negative prompts, when they read them, for a while.

    Raises `ConfigError` when both are the same texts, with other weights; and at the end, when a text encoder was not
    given the prompts as they are.
    """
    if [one.text for one in prompts] == [one.text for one in negative] and list(prompts) != list(negative):
        raise ConfigError(f"prompt: '{prompts[0].text}' is the negative prompt too, with other weights: change one")
    weighs = not all(prompt.is_plain for prompt in (*prompts, *negative))
    weighers, hooks = [], []
    try:
        for encoder, tokenizer in _encoders(family) if weighs else ():
            mine, theirs = ([_tokens(tokenizer, prompt) for prompt in texts] for texts in (prompts, negative))
            weighers.append(_Weigher(tokenizer, [mine, theirs, [*theirs, *mine], [*mine, *theirs]]))
            hooks.append(encoder.register_forward_hook(weighers[-1], with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not all(weigher.met for weigher in weighers):
        raise ConfigError("prompt: this base's pipeline changes prompts before it reads them: leave weights out")


@dataclass(frozen=True)
class _Tokens:
    """A prompt as a text encoder reads it, each token with its weight; the last one is the end's.

    lower: the same as pipelines read it that know no capital letters.
    """

    ids: list[int]
    lower: list[int]
    weights: list[float]

    def weights_in(self, row: list[int]) -> list[float] | None:
        """Return the weights where `row` is this prompt, cut off and filled up; None where it is not."""
        for ids in (self.ids, self.lower):
            count = min(len(ids), len(row)) - 1  # of one that is too long the end is cut off, and its token put behind
            if row[:count] == ids[:count] and row[count] == ids[-1]:
                return self.weights[:count]
        return None


@dataclass
class _Weigher:
    """A hook on a text encoder.

    known: what it may be asked to read in one pass, row by row. met: it was asked for some of that.
    """

    tokenizer: Any
    known: list[list[_Tokens]]
    met: bool = field(default=False)
    asking: bool = field(default=False)

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Weigh what the encoder made of the prompts that are known."""
        if self.asking:
            return out
        named = {"input_ids": args[0], **kwargs} if args else kwargs
        ids: Tensor = named["input_ids"]
        weights = self._weights(ids)
        if bool((weights == 1.0).all()):
            return out
        self.asking = True
        try:
            empty = encoder(*args[1:], **{**named, **self._nothing(ids, named)})
        finally:
            self.asking = False
        for name in ("last_hidden_state", "hidden_states"):
            mine, nothing = out.get(name), empty.get(name)
            if isinstance(mine, Tensor):
                out[name] = torch.lerp(nothing, mine, weights.to(mine)[..., None])
            elif mine is not None:
                pairs = zip(nothing, mine, strict=True)
                out[name] = tuple(torch.lerp(of, one, weights.to(one)[..., None]) for of, one in pairs)
        return out

    def _weights(self, ids: Tensor) -> Tensor:
        """Return the weight of every token of a batch (rows, tokens)."""
        weights, rows = torch.ones(ids.shape), ids.tolist()
        for group in self.known:
            found = [prompt.weights_in(row) for prompt, row in zip(group, rows, strict=False)]
            if len(group) == len(rows) and None not in found:
                self.met = True
                for row, own in enumerate(found):
                    weights[row, : len(own or ())] = torch.tensor(own)
                break
        return weights

    def _nothing(self, ids: Tensor, named: dict[str, Any]) -> dict[str, Tensor]:
        """Return the empty prompt in as many rows and tokens, with its mask where one is given."""
        made = self.tokenizer("", padding="max_length", max_length=ids.shape[1], truncation=True, return_tensors="pt")
        given = {"input_ids"} | ({"attention_mask"} if named.get("attention_mask") is not None else set())
        return {name: made[name].to(ids.device).expand_as(ids) for name in given}


def _tokens(tokenizer: Any, prompt: Weighed) -> _Tokens:
    made = tokenizer(prompt.text, return_offsets_mapping=True)
    weights = [prompt.weights[end - 1] if end > start else 1.0 for start, end in made["offset_mapping"]]
    return _Tokens(made["input_ids"], tokenizer(prompt.text.lower())["input_ids"], weights)


def _encoders(family: Family) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the text encoders of a base, each with its tokenizer."""
    for name, part in family.pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            yield part, getattr(family.pipeline, name.replace("text_encoder", "tokenizer"))
