"""Layer names of the text encoders that families share: CLIP (transformers CLIPTextModel) and T5 (T5EncoderModel)."""

from __future__ import annotations

from vislora.formats.names.table import NameTable, Row

_CLIP_LAYER = "text_model.encoder.layers.{}"
_T5_BLOCK = "encoder.block.{}.layer"

CLIP = NameTable(
    Row(path)
    for path in (
        *(f"{_CLIP_LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *(f"{_CLIP_LAYER}.{name}" for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")),
        "text_model.embeddings.token_embedding",
        "text_model.embeddings.position_embedding",
        "text_model.final_layer_norm",
        "text_projection",
    )
)

# a causal language model as text encoder (Qwen, Gemma, Llama, Mistral), with and without its `model.` in front
_LLM_LAYER = "layers.{}"
LLM = NameTable(
    Row(f"model.{path}", stored)
    for path, stored in (
        *((f"{_LLM_LAYER}.self_attn.{name}",) * 2 for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *((f"{_LLM_LAYER}.mlp.{name}",) * 2 for name in ("gate_proj", "up_proj", "down_proj")),
        *((f"{_LLM_LAYER}.{name}",) * 2 for name in ("input_layernorm", "post_attention_layernorm")),
        ("embed_tokens", "embed_tokens"),
        ("norm", "norm"),
    )
)

T5 = NameTable(
    Row(path)
    for path in (
        *(f"{_T5_BLOCK}.0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")),
        *(f"{_T5_BLOCK}.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
        f"{_T5_BLOCK}.{{}}.layer_norm",
        "shared",
        "encoder.embed_tokens",
        "encoder.final_layer_norm",
    )
)
