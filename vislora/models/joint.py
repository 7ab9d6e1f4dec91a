"""Joint attention of Stable Diffusion 3 (arXiv 2403.03206) in which equal tokens of the text count without being there.

diffusers puts 256 tokens of zeros where T5 is left out. Tokens that are equal stay equal, for no position is added to
the text: one of them, whose attention score is raised by log(n), gives what n of them give.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor


class CountedJointAttention(JointAttnProcessor2_0):
    """diffusers' processor, which takes one argument more, `last_counts`: for how many the last token stands."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_counts: int = 1,
        **others: Any,
    ) -> Any:
        """Return what attention adds to the image's tokens and to the text's, both (batch, tokens, width)."""
        if encoder_hidden_states is None or last_counts == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **others)
        image = _split(attn.heads, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        text = _split(
            attn.heads,
            attn.add_q_proj(encoder_hidden_states),
            attn.add_k_proj(encoder_hidden_states),
            attn.add_v_proj(encoder_hidden_states),
        )
        image = _normed(image, attn.norm_q, attn.norm_k)
        text = _normed(text, attn.norm_added_q, attn.norm_added_k)
        query, key, value = (torch.cat(pair, 2) for pair in zip(image, text, strict=True))
        more = F.pad(key.new_full((1,), math.log(last_counts)), (key.shape[2] - 1, 0))
        found = self.attend(query, key, value, more)
        ours, theirs = found.transpose(1, 2).flatten(2).split([image[0].shape[2], text[0].shape[2]], 1)
        ours = attn.to_out[1](attn.to_out[0](ours))
        return ours, theirs if attn.context_pre_only else attn.to_add_out(theirs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, more: Tensor) -> Tensor:
        """Return the attention (batch, heads, tokens, width), as `query` is; `more` is added to the scores."""
        return F.scaled_dot_product_attention(query, key, value, more.expand(1, 1, query.shape[2], -1))


def _split(heads: int, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return (batch, tokens, width) as (batch, heads, tokens, width / heads)."""
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)


def _normed(parts: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> tuple[Tensor, ...]:
    query, key, value = parts
    return norm_q(query) if norm_q else query, norm_k(key) if norm_k else key, value
