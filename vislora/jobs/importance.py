"""How much the words of each adapter mean in a prompt, for compositions that weigh adapters by it.

W-Switch and W-Composite (Tsoumplekas et al., arXiv 2606.03792) weigh each LoRA by the semantic influence of its trigger
words in the prompt. Here the influence of words is how far the prompt's meaning moves when they are left out:

    d_i = sum over text encoders of |m(prompt) - m(prompt without words i)| / |m(prompt)|
    share_i = d_i / sum_j d_j

m: the mean over the tokens of the encoder's last states. The paper's own measure was not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vislora.errors import ConfigError
from vislora.models.base import tokenizers_of


def prompt_shares(pipeline: Any, prompt: str, words: Mapping[str, str]) -> dict[str, float]:
    """Return name -> share of each adapter in `words`, above 0 and adding up to 1, for `set_composition`.

    words: name of an adapter -> its words in the prompt, several with commas between. Raises `ConfigError` for words
    that are not in the prompt or change nothing there, and for a pipeline without text encoders and tokenizers.
    """
    readers = _readers(pipeline)
    rest = {name: without(prompt, phrase) for name, phrase in words.items()}
    lacking = [f"'{words[name]}' ({name})" for name, text in rest.items() if text == without(prompt, "")]
    if lacking:
        raise ConfigError(
            f"the prompt '{prompt}' does not have {', '.join(lacking)}: say the words in it, or give shares yourself"
        )
    moved = dict.fromkeys(words, 0.0)
    for encoder, tokenizer in readers:
        whole = _mean_state(encoder, tokenizer, prompt)
        for name, text in rest.items():
            moved[name] += float((_mean_state(encoder, tokenizer, text) - whole).norm() / whole.norm())
    still = [f"'{words[name]}' ({name})" for name, by in moved.items() if not 0.0 < by < float("inf")]
    if still:
        raise ConfigError(
            f"{', '.join(still)} changes nothing that the base reads in '{prompt}': is the prompt too long for it?"
        )
    return {name: by / sum(moved.values()) for name, by in moved.items()}


def without(prompt: str, words: str) -> str:
    """Return `prompt` without each of `words`, which commas part, the comma before it, and commas at the ends."""
    for word in (part.strip() for part in words.split(",")):
        if word:
            prompt = re.sub(rf"\s*,?\s*(?<!\w){re.escape(word)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    return prompt.strip(" ,")


def _readers(pipeline: Any) -> list[tuple[Any, Any]]:
    """Return the text encoders of `pipeline`, each with its tokenizer."""
    tokenizers = {} if isinstance(pipeline, nn.Module) else tokenizers_of(pipeline)
    pairs = [
        (getattr(pipeline, name.replace("tokenizer", "text_encoder"), None), tokenizer)
        for name, tokenizer in tokenizers.items()
    ]
    found = [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None]
    if not found:
        raise ConfigError(
            f"{type(pipeline).__name__} has no text encoder to tell what words mean: give shares yourself"
        )
    return found


@torch.no_grad()
def _mean_state(encoder: Any, tokenizer: Any, text: str) -> Tensor:
    """Return the mean over the tokens of `text` of the last states, (width,), float32."""
    ids = tokenizer(text, truncation=True, return_tensors="pt").input_ids
    states = encoder(ids.to(encoder.device), output_hidden_states=True).hidden_states[-1]
    return states[0].float().mean(0)
