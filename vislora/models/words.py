"""Words that text encoders are taught: textual inversion embeddings, called in prompts by their names.

Such a word is one or more vectors, each in the place of a token's own (Gal et al., arXiv 2208.01618). The tokenizer
puts tokens of their own where a prompt has the name, in upper or lower case, with or without ComfyUI's `embedding:`
before it, and a hook on the text encoder's embedding gives these their vectors; its weight stays as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import AdapterMismatchError, ConfigError
from vislora.models.base import components_of
from vislora.registry import FAMILIES

PLAIN = "emb_params"
"""The slot of an embedding that does not say which text encoder it is for, as there is but one."""
FIRST_CHARACTER = 0xF0000
"""Tokens are called by characters for private use, which no prompt has."""
_KEY = "_vislora_words"


@dataclass
class Vocabulary:
    """One text encoder and its tokenizer.

    words: (owner, name) -> vectors (count, width). first: the number of the first token of theirs.
    """

    encoder: Any
    tokenizer: Any
    backend: Any
    ends: dict[nn.Module, int]
    words: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    first: int = 0
    _asked: Tensor | None = None
    _hooks: list[Any] = field(default_factory=list)

    @staticmethod
    def of(encoder: Any, tokenizer: Any) -> Vocabulary:
        """Return the vocabulary of an encoder, a new one where it was taught nothing."""
        if _KEY in encoder.__dict__:
            known: Vocabulary = encoder.__dict__[_KEY]
            return known
        ends = {module: module.eos_token_id for module in encoder.modules() if hasattr(module, "eos_token_id")}
        return Vocabulary(encoder, tokenizer, tokenizer.backend_tokenizer, ends)

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        return int(self.encoder.get_input_embeddings().weight.shape[1])

    def require_free(self, name: str, vectors: Tensor) -> None:
        """Raise `ConfigError` when the word is known already, with other vectors."""
        for (owner, there), held in self.words.items():
            if there == name.lower() and not torch.equal(held, vectors):
                raise ConfigError(f"the word '{name}' is taught by '{owner}' already, with another meaning")

    def apply(self) -> None:
        """Have tokenizer and encoder know these words, and no others."""
        self.tokenizer._tokenizer = self._taught() if self.words else self.backend
        wrap = getattr(self.tokenizer, "_wrap_decode_method_backend_tokenizer", None)
        if self.words and wrap is not None:  # CLIP's tokenizer has a method of the instance, which the copy lost
            wrap()
        for module, own in self.ends.items():
            # with 2, as old configs say, transformers takes the highest number for the end: that of a new token
            module.eos_token_id = self.tokenizer.eos_token_id if self.words else own  # type: ignore[assignment]
        if self.words and not self._hooks:
            embedding = self.encoder.get_input_embeddings()
            self._hooks = [embedding.register_forward_pre_hook(self._ask), embedding.register_forward_hook(self._put)]
            self.encoder.__dict__[_KEY] = self
        elif not self.words and self._hooks:
            while self._hooks:
                self._hooks.pop().remove()
            del self.encoder.__dict__[_KEY]

    def _meanings(self) -> list[tuple[str, Tensor]]:
        """Return the words, the longest first, and their vectors in the order of their tokens."""
        words = {name: vectors for (_, name), vectors in self.words.items()}
        return sorted(words.items(), key=lambda word: -len(word[0]))

    def _taught(self) -> Any:
        """Return a tokenizer that puts characters in the place of the names, and has a token for each of these."""
        from tokenizers import AddedToken, Regex, normalizers

        taught, steps, number = copy.deepcopy(self.backend), [], FIRST_CHARACTER
        for name, vectors in self._meanings():
            characters = [chr(number + index) for index in range(len(vectors))]
            taught.add_tokens([AddedToken(character, normalized=True, special=False) for character in characters])
            steps.append(normalizers.Replace(Regex(_called(name)), "".join(characters)))
            number += len(vectors)
        own = [] if self.backend.normalizer is None else [self.backend.normalizer]
        taught.normalizer = normalizers.Sequence([*steps, *own])
        self.first = taught.token_to_id(chr(FIRST_CHARACTER))
        return taught

    def _ask(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the embedding look up other tokens in the place of the new ones, for which it has no rows."""
        self._asked = given[0]
        return given[0].masked_fill(given[0] >= self.first, 0), *given[1:]

    def _put(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Put the vectors of the new tokens in their places."""
        assert self._asked is not None
        places, self._asked = self._asked - self.first, None
        table = torch.cat([vectors.to(out) for _, vectors in self._meanings()])
        return torch.where((places >= 0)[..., None], F.embedding(places.clamp(min=0), table), out)


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


@torch.no_grad()
def forget(pipeline: Any, owner: str) -> None:
    """Take back what `owner` taught, if anything: with the last word, tokenizers and encoders are as they were."""
    for vocabulary in _taught(pipeline):
        vocabulary.words = {key: vectors for key, vectors in vocabulary.words.items() if key[0] != owner}
        vocabulary.apply()


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
    yield from (module.__dict__[_KEY] for module in modules if _KEY in module.__dict__)


def _encoders(pipeline: Any) -> dict[str, Vocabulary]:
    """Return the text encoders by component. Raises `AdapterMismatchError` where not all are CLIP's."""
    family, components = (None, {}) if isinstance(pipeline, nn.Module) else components_of(pipeline)
    found = {name: module for name, module in components.items() if name != "denoiser"}
    if family is None or not found or not all(name.startswith("te:clip") for name in found):
        raise AdapterMismatchError("only bases whose text encoders are all CLIP's are taught words: SD and SDXL")
    attributes = FAMILIES[family].card.attributes
    tokenizers = {name: getattr(pipeline, attributes[name].replace("text_encoder", "tokenizer")) for name in found}
    return {name: Vocabulary.of(module, tokenizers[name]) for name, module in found.items()}


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
        self._words = {
            name: {
                slots[component]: nn.Parameter(_first(part, text or name, count)) for component, part in known.items()
            }
            for name, (count, text) in words.items()
        }
        self.vectors = nn.ParameterList(own for found in self._words.values() for own in found.values())
        teach(pipeline, owner, self._words)

    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """Return name -> slot -> vectors (count, width) as they are, as copies in main memory."""
        return {
            name: {slot: own.detach().cpu().clone() for slot, own in found.items()}
            for name, found in self._words.items()
        }

    def close(self) -> None:
        """Have tokenizers and text encoders as they were."""
        forget(self._pipeline[0], self._owner)


def _first(vocabulary: Vocabulary, text: str, count: int | None) -> Tensor:
    """Return the vectors that a text encoder has for a text: the first `count`, over and over where it has less."""
    ids = vocabulary.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"the text encoder reads nothing in {text!r}: begin the word with another text")
    wanted = [ids[index % len(ids)] for index in range(count or len(ids))]
    return vocabulary.encoder.get_input_embeddings().weight[wanted].detach().float().cpu()


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
        width = known[component].width
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise AdapterMismatchError(
                f"the word '{name}' is for another base: its vectors are {tuple(vectors.shape)}, this one's "
                f"{component.removeprefix('te:')} reads {width} numbers"
            )
    return found
