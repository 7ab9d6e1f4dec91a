"""Layer names of FLUX.1 (dev, schnell, Fill, Kontext, Control): diffusers FluxTransformer2DModel, BFL's flux/model.py.

    lora_unet_double_blocks_0_img_attn_qkv             -> transformer_blocks.0.attn.to_q, .to_k, .to_v (by rows)
    lora_unet_single_blocks_37_linear1                 -> single_transformer_blocks.37.attn.to_q, ..., .proj_mlp
    diffusion_model.final_layer.adaLN_modulation.1     -> norm_out.linear, whose halves (shift, scale) change places

Spec of kohya's files: sd-scripts networks/lora_flux.py. OneTrainer's call the T5 `lora_te2_`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.table import FamilyNames, NameTable, Row, Share, Sign
from vislora.formats.names.text import CLIP, T5

_BLOCK, _DOUBLE = "transformer_blocks.{}", "double_blocks.{}"
_SINGLE_BLOCK, _SINGLE = "single_transformer_blocks.{}", "single_blocks.{}"
_STREAMS = (
    ("txt", "ff_context", "to_add_out", "norm_added_q", "norm_added_k"),
    ("img", "ff", "to_out.0", "norm_q", "norm_k"),
)
_FUSED = (
    ("img_attn.qkv", ("to_q", "to_k", "to_v")),
    ("txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
)
_EMBEDDERS = (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in"))
_MODULATIONS = (
    (f"{_BLOCK}.norm1.linear", f"{_DOUBLE}.img_mod.lin"),
    (f"{_BLOCK}.norm1_context.linear", f"{_DOUBLE}.txt_mod.lin"),
    (f"{_SINGLE_BLOCK}.norm.linear", f"{_SINGLE}.modulation.lin"),
)
# what tells these blocks from those of other transformers: their width, and how many there are (19 and 38)
BLOCK_SIGNS = (
    Sign(r"(single_)?transformer_blocks\.\d+\..*", (3072, 12288, 15360)),
    Sign(r"(transformer_blocks\.18|single_transformer_blocks\.37)\..*"),
)
BLOCKS_AGAINST = (
    Sign(r"(transformer_blocks\.(19|[2-9]\d)|single_transformer_blocks\.(3[89]|[4-9]\d))\..*"),
    # the smallest FLUX.2 has this width too, but narrower feed-forwards
    Sign(r"single_transformer_blocks\.\d+\.proj_out", (12288,)),
    Sign(r"transformer_blocks\.\d+\.ff(_context)?\.net\.2", (9216,)),
)


def common_rows() -> Iterator[Row]:
    """Yield the layers that Flux and Chroma share: the blocks without their modulations, the way in and out."""
    yield Row("x_embedder", "img_in")
    yield Row("context_embedder", "txt_in")
    yield Row("proj_out", "final_layer.linear")
    for stream, feed_forward, out, norm_q, norm_k in _STREAMS:
        yield Row(f"{_BLOCK}.attn.{out}", f"{_DOUBLE}.{stream}_attn.proj")
        yield Row(f"{_BLOCK}.attn.{norm_q}", f"{_DOUBLE}.{stream}_attn.norm.query_norm")
        yield Row(f"{_BLOCK}.attn.{norm_k}", f"{_DOUBLE}.{stream}_attn.norm.key_norm")
        yield Row(f"{_BLOCK}.{feed_forward}.net.0.proj", f"{_DOUBLE}.{stream}_mlp.0")
        yield Row(f"{_BLOCK}.{feed_forward}.net.2", f"{_DOUBLE}.{stream}_mlp.2")
    for stored, members in _FUSED:
        for index, name in enumerate(members):
            yield Row(f"{_BLOCK}.attn.{name}", f"{_DOUBLE}.{stored}", Share(index))
    for index, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        yield Row(f"{_SINGLE_BLOCK}.{name}", f"{_SINGLE}.linear1", Share(index, (1, 1, 1, 4)))
    yield Row(f"{_SINGLE_BLOCK}.proj_out", f"{_SINGLE}.linear2")
    yield Row(f"{_SINGLE_BLOCK}.attn.norm_q", f"{_SINGLE}.norm.query_norm")
    yield Row(f"{_SINGLE_BLOCK}.attn.norm_k", f"{_SINGLE}.norm.key_norm")


def _own_rows() -> Iterator[Row]:
    yield from (Row(path, stored) for path, stored in _MODULATIONS)
    yield Row("norm_out.linear", "final_layer.adaLN_modulation.1", swap="always")
    for name, stored in _EMBEDDERS:
        yield Row(f"time_text_embed.{name}_embedder.linear_1", f"{stored}.in_layer")
        yield Row(f"time_text_embed.{name}_embedder.linear_2", f"{stored}.out_layer")


FLUX = FamilyNames(
    family="flux",
    tables={"denoiser": NameTable((*common_rows(), *_own_rows())), "te:clip_l": CLIP, "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_", "te:clip_l": "lora_te1_", "te:t5": "lora_te3_"},
    folders={"denoiser": "transformer", "te:clip_l": "text_encoder", "te:t5": "text_encoder_2"},
    flattened=frozenset({"te:clip_l"}),
    signs=BLOCK_SIGNS,
    against=BLOCKS_AGAINST,
    versions=("flux1", "flux-1", "flux.1", "flux-kontext"),
    network_module="networks.lora_flux",
)
