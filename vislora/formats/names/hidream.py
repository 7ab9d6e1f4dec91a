"""Layer names of HiDream-I1: diffusers HiDreamImageTransformer2DModel, which is the original tree too.

lora_unet_double_stream_blocks_0_block_attn1_to_q_t
diffusion_model.single_stream_blocks.3.block.ff_i.experts.2.w1
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import kept
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import CLIP, LLM, T5

_TOP = (
    "t_embedder.timestep_embedder.linear_1",
    "t_embedder.timestep_embedder.linear_2",
    "p_embedder.pooled_embedder.linear_1",
    "p_embedder.pooled_embedder.linear_2",
    "x_embedder.proj",
    "caption_projection.{}.linear",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")
_FEED_FORWARD = ("w1", "w2", "w3")


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that a HiDreamImageTransformer2DModel can have."""
    yield from kept(_TOP)
    for block in ("double_stream_blocks.{}.block.", "single_stream_blocks.{}.block."):
        yield Row(f"{block}adaLN_modulation.1")
        yield from kept(_ATTENTION, f"{block}attn1.")
        for part in ("ff_i", "ff_i.shared_experts", "ff_i.experts.{}"):
            yield from kept(_FEED_FORWARD, f"{block}{part}.")
    yield from kept((f"{name}_t" for name in _ATTENTION), "double_stream_blocks.{}.block.attn1.")
    yield from kept(_FEED_FORWARD, "double_stream_blocks.{}.block.ff_t.")


HIDREAM = FamilyNames(
    family="hidream",
    tables={
        "denoiser": NameTable(transformer_rows()),
        "te:clip_l": CLIP,
        "te:clip_g": CLIP,
        "te:t5": T5,
        "te:llm": LLM,
    },
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={
        "denoiser": "transformer",
        "te:clip_l": "text_encoder",
        "te:clip_g": "text_encoder_2",
        "te:t5": "text_encoder_3",
        "te:llm": "text_encoder_4",
    },
    flat_from="path",
    signs=(Sign(r"(double|single)_stream_blocks\.\d+\.block\.attn1\..*", (2560,)),),
    versions=("hidream",),
)
