"""Words that text encoders are taught: textual inversion embeddings, called in prompts by their names.

Such a word is one or more vectors, each in the place of a token's own (Gal et al., arXiv 2208.01618). The tokenizer
puts tokens of their own where a prompt has the name, in upper or lower case, with or without ComfyUI's `embedding:`
before it; the text encoder has their vectors as further rows. Both are exchanged whole and put back as they were.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vislora.errors import AdapterMismatchError, ConfigError
from vislora.models.base import components_of
from vislora.registry import FAMILIES

PLAIN = "emb_params"
"""The slot of an embedding that does not say which text encoder it is for, as there is but one."""
FIRST_CHARACTER = 0xF0000
"""Tokens are called by characters for private use, which no prompt has."""


@dataclass
class Vocabulary:
    """One text encoder and its tokenizer.

    words: (owner, name) -> vectors (count, width). numbers: name -> the numbers of its tokens.
    """

    encoder: Any
    tokenizer: Any
    backend: Any
    weight: nn.Parameter
    ends: dict[nn.Module, int]
    words: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(encoder: Any, tokenizer: Any) -> Vocabulary:
        """Return the vocabulary of an encoder that was taught nothing."""
        ends = {module: module.eos_token_id for module in encoder.modules() if hasattr(module, "eos_token_id")}
        weight = encoder.get_input_embeddings().weight
        return Vocabulary(encoder, tokenizer, tokenizer.backend_tokenizer, weight, ends)

    def require_free(self, name: str, vectors: Tensor) -> None:
        """Raise `ConfigError` when the word is known already, with other vectors."""
        for (owner, there), held in self.words.items():
            if there == name.lower() and not torch.equal(held, vectors):
                raise ConfigError(f"the word '{name}' is taught by '{owner}' already, with another meaning")

    def apply(self) -> None:
        """Have tokenizer and encoder know these words, and no others."""
        words = {name: vectors for (_, name), vectors in self.words.items()}
        backend, weight = self._taught(words) if words else (self.backend, self.weight)
        self.tokenizer._tokenizer = backend
        wrap = getattr(self.tokenizer, "_wrap_decode_method_backend_tokenizer", None)
        if words and wrap is not None:  # CLIP's tokenizer has a method of the instance, which the copy lost
            wrap()
        embedding = self.encoder.get_input_embeddings()
        embedding.weight, embedding.num_embeddings = weight, len(weight)
        for module, own in self.ends.items():
            # with 2, as old configs say, transformers takes the highest number for the end: that of a new token
            module.eos_token_id = self.tokenizer.eos_token_id if words else own  # type: ignore[assignment]

    def _taught(self, words: Mapping[str, Tensor]) -> tuple[Any, nn.Parameter]:
        """Return a tokenizer that puts characters in the place of the names, and the vectors of the tokens of these."""
        from tokenizers import AddedToken, Regex, normalizers

        taught = copy.deepcopy(self.backend)
        steps, characters = [], [chr(FIRST_CHARACTER + number) for number in range(sum(map(len, words.values())))]
        taught.add_tokens([AddedToken(character, normalized=True, special=False) for character in characters])
        for name in sorted(words, key=len, reverse=True):
            own, characters = characters[: len(words[name])], characters[len(words[name]) :]
            steps.append(normalizers.Replace(Regex(_called(name)), "".join(own)))
            self.numbers[name] = [taught.token_to_id(character) for character in own]
        if self.backend.normalizer is not None:
            steps.append(self.backend.normalizer)
        taught.normalizer = normalizers.Sequence(steps)
        count = max(number + 1 for name in words for number in self.numbers[name])
        rows = self.weight.new_zeros(max(len(self.weight), count), self.weight.shape[1])
        rows[: len(self.weight)] = self.weight
        for name, vectors in words.items():
            rows[self.numbers[name]] = vectors.to(rows)
        return taught, nn.Parameter(rows, requires_grad=self.weight.requires_grad)


_vocabularies: WeakKeyDictionary[nn.Module, Vocabulary] = WeakKeyDictionary()


@torch.no_grad()
def teach(pipeline: Any, owner: str, words: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Teach the text encoders of `pipeline` words: name -> slot -> vectors (count, width) or (width,).

    `owner`: whom `forget` calls by. Raises `AdapterMismatchError` for a word that is not for these text encoders, and
    `ConfigError` for one that they know with other vectors; nothing is taught then.
    """
    known = _encoders(pipeline)
    placed = {name: _placed(name, slots, known) for name, slots in words.items()}
    for component, vocabulary in known.items():
        for name, vectors in placed.items():
            vocabulary.require_free(name, vectors[component])
    for component, vocabulary in known.items():
        vocabulary.words |= {(owner, name.lower()): vectors[component] for name, vectors in placed.items()}
        vocabulary.apply()
        _vocabularies[vocabulary.encoder] = vocabulary


@torch.no_grad()
def forget(pipeline: Any, owner: str) -> None:
    """Take back what `owner` taught, if anything: with the last word, tokenizers and encoders are as they were."""
    for vocabulary in _taught(pipeline):
        vocabulary.words = {key: vectors for key, vectors in vocabulary.words.items() if key[0] != owner}
        vocabulary.apply()
        if not vocabulary.words:
            del _vocabularies[vocabulary.encoder]


def teachers(pipeline: Any) -> list[str]:
    """Return the owners of words that the text encoders know."""
    return list(dict.fromkeys(owner for vocabulary in _taught(pipeline) for owner, _ in vocabulary.words))


def has_word(prompt: str, name: str) -> bool:
    """Say whether a prompt has this word in it, and not as a part of another."""
    return re.search(_called(name), prompt) is not None


def _called(name: str) -> str:
    return rf"(?i)(?<!\w)(?:embedding:)?{re.escape(name)}(?!\w)"


def _taught(pipeline: Any) -> Iterator[Vocabulary]:
    modules = [] if isinstance(pipeline, nn.Module) else components_of(pipeline)[1].values()
    yield from (_vocabularies[module] for module in modules if module in _vocabularies)


def _encoders(pipeline: Any) -> dict[str, Vocabulary]:
    """Return the text encoders by component. Raises `AdapterMismatchError` where not all are CLIP's."""
    family, components = (None, {}) if isinstance(pipeline, nn.Module) else components_of(pipeline)
    found = {name: module for name, module in components.items() if name != "denoiser"}
    if family is None or not found or not all(name.startswith("te:clip") for name in found):
        raise AdapterMismatchError("only bases whose text encoders are all CLIP's are taught words: SD and SDXL")
    attributes = FAMILIES[family].card.attributes
    tokenizers = {name: getattr(pipeline, attributes[name].replace("text_encoder", "tokenizer")) for name in found}
    return {
        name: _vocabularies.get(module) or Vocabulary.of(module, tokenizers[name]) for name, module in found.items()
    }


class LearnedWords(nn.Module):
    """Words whose vectors are trained: parameters of this module, which the text encoders read in every pass.

    So does textual inversion (Gal et al., arXiv 2208.01618); beside an adapter it is called pivotal tuning. `words`:
    name -> how many vectors (None: as many as its tokens) and the text whose vectors they begin as; '' is the word
    itself, so that a word begins as what the base reads. `close` takes all back.
    """

    def __init__(self, pipeline: Any, owner: str, words: Mapping[str, tuple[int | None, str]]) -> None:
        super().__init__()
        self._pipeline, self._owner = (pipeline,), owner  # a tuple hides the models from nn.Module's registration
        known = _encoders(pipeline)
        slots = {component: PLAIN if len(known) == 1 else component.removeprefix("te:") for component in known}
        first = {
            name: {slots[component]: _first(part, text or name, count) for component, part in known.items()}
            for name, (count, text) in words.items()
        }
        teach(pipeline, owner, first)
        self.names = list(words)
        self.vectors = nn.ModuleDict()
        for slot in slots.values():
            self.vectors[slot] = nn.ParameterList(nn.Parameter(first[name][slot].clone()) for name in self.names)
        self._hooks = [
            part.encoder.get_input_embeddings().register_forward_hook(partial(self._put, slots[component], part))
            for component, part in _encoders(pipeline).items()
        ]

    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """Return name -> slot -> vectors (count, width) as they are, as copies in main memory."""
        return {
            name: {
                slot: cast(nn.ParameterList, own)[index].detach().cpu().clone() for slot, own in self.vectors.items()
            }
            for index, name in enumerate(self.names)
        }

    def close(self) -> None:
        """Have tokenizers and text encoders as they were."""
        for hook in self._hooks:
            hook.remove()
        forget(self._pipeline[0], self._owner)

    def _put(
        self, slot: str, vocabulary: Vocabulary, module: nn.Module, given: tuple[Tensor, ...], out: Tensor
    ) -> Tensor:
        """Put the vectors of this moment in the place of those that were taught."""
        for name, own in zip(self.names, cast(nn.ParameterList, self.vectors[slot]), strict=True):
            for number, vector in zip(vocabulary.numbers[name.lower()], own.to(out), strict=True):
                out = torch.where((given[0] == number)[..., None], vector, out)
        return out


def _first(vocabulary: Vocabulary, text: str, count: int | None) -> Tensor:
    """Return the vectors that a text encoder has for a text: the first `count`, over and over where it has less."""
    ids = vocabulary.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"the text encoder reads nothing in {text!r}: begin the word with another text")
    wanted = [ids[index % len(ids)] for index in range(count or len(ids))]
    return vocabulary.weight[wanted].detach().float()


def _placed(name: str, slots: Mapping[str, Tensor], known: Mapping[str, Vocabulary]) -> dict[str, Tensor]:
    """Return the vectors of a word for each text encoder."""
    wanted = {component: component.removeprefix("te:") for component in known}
    plain = [slot for slot in slots if slot == PLAIN or slot.startswith("string_to_param")]
    if len(wanted) == 1 and len(plain) == 1:
        wanted = dict.fromkeys(wanted, plain[0])
    odd = "clip_g" in slots and "clip_g" not in wanted.values()
    lacking = [slot for slot in wanted.values() if slot not in slots]
    if odd or lacking:
        raise AdapterMismatchError(
            f"the word '{name}' is for another base: it has {', '.join(slots)}; this one reads "
            f"{' and '.join(component.removeprefix('te:') for component in known)}"
        )
    found = {component: torch.atleast_2d(slots[slot]).float().cpu() for component, slot in wanted.items()}
    for component, vectors in found.items():
        width = known[component].weight.shape[1]
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise AdapterMismatchError(
                f"the word '{name}' is for another base: its vectors are {tuple(vectors.shape)}, this one's "
                f"{component.removeprefix('te:')} reads {width} numbers"
            )
    return found
