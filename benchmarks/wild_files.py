"""Adapter files as other programs write them, each with its truth: what it does to every layer, known by construction.

The keys are spelled out by hand here, not by vislora's tables, so that a table that is wrong shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

RANK = 2
WIDTH = 3072  # of FLUX.1
Tensors = dict[str, Tensor]


@dataclass
class Effect:
    """What a file does to one layer: `delta` is scale * up @ down, or dense; `magnitude` is DoRA's."""

    component: str
    path: str
    up: Tensor
    down: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    def probe(self, vector: Tensor) -> Tensor:
        """Return the delta, as a matrix, times a vector."""
        return self.scale * (self.up.double().flatten(1) @ (self.down.double().flatten(1) @ vector.double()))


@dataclass
class WildFile:
    """A file in memory. `pipeline`: the kind of diffusers pipeline that it is for."""

    pipeline: str
    tensors: Tensors = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


class Maker:
    """Draws the two halves of layers, the same ones in every run."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._count = 0

    def draw(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(*shape, generator=self._generator)

    def alpha(self) -> float:
        """Return 1, 2, 3, 4, 1, ...: every module another one."""
        self._count += 1
        return float(1 + (self._count - 1) % 4)


# ---------------------------------------------------------------- Stable Diffusion 1.5: one block of every sort
SD_LAYERS: tuple[tuple[str, int, int], ...] = tuple(
    (f"{block}.transformer_blocks.0.{name}", size(width), inputs(width))
    for block, width in (
        ("down_blocks.0.attentions.0", 320),
        ("mid_block.attentions.0", 1280),
        ("up_blocks.3.attentions.2", 320),
    )
    for name, size, inputs in (
        ("attn1.to_q", lambda w: w, lambda w: w),
        ("attn1.to_k", lambda w: w, lambda w: w),
        ("attn1.to_v", lambda w: w, lambda w: w),
        ("attn1.to_out.0", lambda w: w, lambda w: w),
        ("attn2.to_k", lambda w: w, lambda w: 768),
        ("ff.net.0.proj", lambda w: 8 * w, lambda w: w),
    )
)
CLIP_LAYERS = tuple(
    (f"text_model.encoder.layers.{number}.{name}", out, inputs)
    for number in (0, 11)
    for name, out, inputs in (("self_attn.q_proj", 768, 768), ("self_attn.v_proj", 768, 768), ("mlp.fc1", 3072, 768))
)


def stable_diffusion(
    key: Callable[[str, str, str], str],
    alphas: bool | float = True,
    text: bool = True,
    layers: tuple[tuple[str, int, int], ...] = SD_LAYERS,
    pipeline: str = "sd",
) -> WildFile:
    """Give every layer a LoRA. key(component, path, slot): the file's spelling; alphas: each its own, one, or none."""
    maker, made = Maker(), WildFile(pipeline)
    places = [("denoiser", *layer) for layer in layers] + [("te:clip_l", *layer) for layer in CLIP_LAYERS if text]
    for component, path, out, inputs in places:
        down, up = maker.draw(RANK, inputs), maker.draw(out, RANK)
        made.tensors[key(component, path, "down")] = down
        made.tensors[key(component, path, "up")] = up
        alpha = float(RANK) if alphas is False else maker.alpha() if alphas is True else alphas
        if alphas is not False:
            made.tensors[key(component, path, "alpha")] = torch.tensor(alpha)
        made.effects.append(Effect(component, path, up, down, alpha / RANK))
    return made


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}


def kohya_key(component: str, path: str, slot: str) -> str:
    """lora_unet_mid_block_attentions_0_..._to_k.lora_down.weight."""
    prefix = {"denoiser": "lora_unet_", "te:clip_l": "lora_te_"}[component]
    return f"{prefix}{path.replace('.', '_')}.{KOHYA[slot]}"


def kohya_sdxl_key(component: str, path: str, slot: str) -> str:
    """lora_unet_input_blocks_4_1_..., lora_te1_...: the names of SDXL's own code."""
    for block, original in SDXL_BLOCKS.items():
        path = path.replace(block, original) if component == "denoiser" else path
    prefix = {"denoiser": "lora_unet_", "te:clip_l": "lora_te1_"}[component]
    return f"{prefix}{path.replace('.', '_')}.{KOHYA[slot]}"


def mixed_sdxl_key(component: str, path: str, slot: str) -> str:
    """Some names of SDXL's own code, some of diffusers, in one file."""
    own = kohya_sdxl_key(component, path, slot)
    other = kohya_key(component, path, slot).replace("lora_te_", "lora_te1_")
    return other if "mid_block" in path else own


SDXL_BLOCKS = {
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
}
SDXL_LAYERS = tuple(
    (f"{block}.transformer_blocks.{depth}.{name}", width, inputs or width)
    for block, width in (("down_blocks.1.attentions.0", 640), ("mid_block.attentions.0", 1280))
    for depth in (0, 1)
    for name, inputs in (("attn1.to_q", 0), ("attn1.to_out.0", 0), ("attn2.to_k", 2048), ("attn2.to_v", 2048))
)


def old_diffusers_key(component: str, path: str, slot: str) -> str:
    """down_blocks.0....attn1.processor.to_q_lora.down.weight."""
    block, _, name = path.rpartition(".attn")
    which, _, projection = name.partition(".")
    return f"{block}.attn{which}.processor.{projection.removesuffix('.0')}_lora.{slot}.weight"


def adapter_key(component: str, path: str, slot: str) -> str:
    """unet....to_q.lora_A.default.weight: a dump of a PEFT model."""
    prefix = {"denoiser": "unet", "te:clip_l": "text_encoder"}[component]
    return f"{prefix}.{path}.{PEFT[slot].replace('.', '.default.')}"


def peft_key(component: str, path: str, slot: str) -> str:
    """base_model.model.down_blocks....lora_A.weight."""
    return f"base_model.model.{path}.{PEFT[slot]}"


def compound_key(component: str, path: str, slot: str) -> str:
    """unet.base_model.model.down_blocks....lora_A.weight."""
    return f"unet.{peft_key(component, path, slot)}"


def lycoris_key(component: str, path: str, slot: str) -> str:
    """lycoris_down_blocks_0_....lora_down.weight."""
    return f"lycoris_{path.replace('.', '_')}.{KOHYA[slot]}"


def with_bundle(made: WildFile) -> WildFile:
    """Add an embedding, as A1111 bundles them."""
    made.tensors["bundle_emb.my.style.string_to_param.*"] = torch.ones(2, 768)
    return made


def with_dora(made: WildFile, slot: str) -> WildFile:
    """Put a magnitude per output on every layer."""
    for key in [key for key in made.tensors if key.endswith(".lora_up.weight")]:
        made.tensors[key.replace("lora_up.weight", slot)] = torch.rand(made.tensors[key].shape[0], 1) + 0.5
    ups = [key for key in made.tensors if key.endswith(".lora_up.weight")]
    for key, effect in zip(ups, made.effects, strict=True):
        effect.magnitude = made.tensors[key.replace("lora_up.weight", slot)].flatten()
    return made


def sd_products(kind: str) -> WildFile:
    """Give every layer LyCORIS' LoHa or LoKr; the effect is dense."""
    maker, made = Maker(), WildFile("sd")
    for path, out, inputs in SD_LAYERS[:6]:
        name = f"lora_unet_{path.replace('.', '_')}"
        if kind == "loha":
            slots = {f"hada_w{i}_{h}": maker.draw(*s) for i in (1, 2) for h, s in (("a", (out, 2)), ("b", (2, inputs)))}
            delta = (slots["hada_w1_a"] @ slots["hada_w1_b"]) * (slots["hada_w2_a"] @ slots["hada_w2_b"]) / 2
        else:
            slots = {"lokr_w1": maker.draw(4, 4), "lokr_w2": maker.draw(out // 4, inputs // 4)}
            delta = torch.kron(slots["lokr_w1"], slots["lokr_w2"])
        made.tensors |= {f"{name}.{slot}": tensor for slot, tensor in slots.items()}
        made.tensors[f"{name}.alpha"] = torch.tensor(1.0)
        made.effects.append(Effect("denoiser", path, delta, torch.eye(inputs)))
    return made


# ---------------------------------------------------------------- FLUX.1: every block, at its real width
@dataclass(frozen=True)
class FluxLayer:
    """A layer of the original tree and the diffusers layers that are its rows, in order: (path, rows)."""

    name: str
    inputs: int
    parts: tuple[tuple[str, int], ...]
    swap: bool = False


def flux_layers(single: bool = True, modulation: bool = True) -> Iterator[FluxLayer]:
    """Yield the layers of all blocks."""
    for number in range(19):
        block, own = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for side, names, proj, ff, norm in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
        ):
            yield FluxLayer(f"{own}.{side}_attn.qkv", WIDTH, tuple((f"{block}.attn.{name}", WIDTH) for name in names))
            yield FluxLayer(f"{own}.{side}_attn.proj", WIDTH, ((f"{block}.attn.{proj}", WIDTH),))
            yield FluxLayer(f"{own}.{side}_mlp.0", WIDTH, ((f"{block}.{ff}.net.0.proj", 4 * WIDTH),))
            yield FluxLayer(f"{own}.{side}_mlp.2", 4 * WIDTH, ((f"{block}.{ff}.net.2", WIDTH),))
            if modulation:
                yield FluxLayer(f"{own}.{side}_mod.lin", WIDTH, ((f"{block}.{norm}.linear", 6 * WIDTH),))
    for number in range(38 if single else 0):
        block, own = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        parts = tuple((f"{block}.attn.{name}", WIDTH) for name in ("to_q", "to_k", "to_v"))
        yield FluxLayer(f"{own}.linear1", WIDTH, (*parts, (f"{block}.proj_mlp", 4 * WIDTH)))
        yield FluxLayer(f"{own}.linear2", 5 * WIDTH, ((f"{block}.proj_out", WIDTH),))
        if modulation:
            yield FluxLayer(f"{own}.modulation.lin", WIDTH, ((f"{block}.norm.linear", 3 * WIDTH),))


FLUX_TOP = (
    FluxLayer("img_in", 64, (("x_embedder", WIDTH),)),
    FluxLayer("txt_in", 4096, (("context_embedder", WIDTH),)),
    FluxLayer("time_in.in_layer", 256, (("time_text_embed.timestep_embedder.linear_1", WIDTH),)),
    FluxLayer("final_layer.linear", WIDTH, (("proj_out", 64),)),
    FluxLayer("final_layer.adaLN_modulation.1", WIDTH, (("norm_out.linear", 2 * WIDTH),), swap=True),
)


def flux_original(layers: Iterator[FluxLayer] | tuple[FluxLayer, ...], key: Callable[[str, str], str]) -> WildFile:
    """Give every original layer a LoRA. key(name, slot): how the file spells it; with alphas, each its own."""
    maker, made = Maker(), WildFile("flux")
    for layer in layers:
        rows = sum(count for _, count in layer.parts)
        down, up, alpha = maker.draw(RANK, layer.inputs), maker.draw(rows, RANK), maker.alpha()
        slots = {"down": down, "up": up, "alpha": torch.tensor(alpha)}
        spelled = {slot: key(layer.name, slot) for slot in slots}
        made.tensors |= {spelled[slot]: tensor for slot, tensor in slots.items() if spelled[slot]}
        scale = alpha / RANK if spelled["alpha"] else 1.0
        pieces = up.split([count for _, count in layer.parts])
        for (path, count), piece in zip(layer.parts, pieces, strict=True):
            rolled = piece.roll(count // 2, 0) if layer.swap else piece
            made.effects.append(Effect("denoiser", path, rolled, down, scale))
    return made


def flux_diffusers(key: Callable[[str, str], str], alphas: bool, skip: str = " ") -> WildFile:
    """Give every diffusers layer a LoRA of its own."""
    maker, made = Maker(), WildFile("flux")
    for layer in flux_layers():
        for path, rows in layer.parts:
            if path.endswith(skip):
                continue
            down, up, alpha = maker.draw(RANK, layer.inputs), maker.draw(rows, RANK), maker.alpha()
            made.tensors |= {key(path, "down"): down, key(path, "up"): up}
            if alphas:
                made.tensors[key(path, "alpha")] = torch.tensor(alpha)
            made.effects.append(Effect("denoiser", path, up, down, alpha / RANK if alphas else 1.0))
    return made


def flux_kohya_key(name: str, slot: str) -> str:
    """lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight."""
    return f"lora_unet_{name.replace('.', '_')}.{KOHYA[slot]}"


def flux_comfy_key(name: str, slot: str) -> str:
    """diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight."""
    return f"diffusion_model.{name}.{PEFT[slot]}"


def flux_fal_key(name: str, slot: str) -> str:
    """base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight, without alpha."""
    return f"base_model.model.{name}.{PEFT[slot]}" if slot != "alpha" else ""


def xlabs_key(name: str, slot: str) -> str:
    """double_blocks.0.processor.qkv_lora1.down.weight, without alpha."""
    block, _, layer = name.rpartition(".")
    block = block.removesuffix("_attn")
    side = "1" if block.endswith("img") else "2"
    return f"{block.rpartition('.')[0]}.processor.{layer}_lora{side}.{slot}.weight" if slot != "alpha" else ""


def onetrainer_key(path: str, slot: str) -> str:
    """lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight."""
    return f"lora_transformer_{path.replace('.', '_')}.{KOHYA[slot]}"


def peft_flux_key(path: str, slot: str) -> str:
    """base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight."""
    return f"base_model.model.{path}.{PEFT[slot]}"


def diffusers_flux_key(path: str, slot: str) -> str:
    """transformer.transformer_blocks.0.attn.to_q.lora_A.weight."""
    return f"transformer.{path}.{PEFT[slot]}"


def with_t5(made: WildFile, prefix: str) -> WildFile:
    """Add two layers of the T5 encoder."""
    maker = Maker(7)
    for path in ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.23.layer.0.SelfAttention.v"):
        down, up = maker.draw(RANK, 4096), maker.draw(4096, RANK)
        name = f"{prefix}{path.replace('.', '_')}"
        slots = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
        made.tensors |= {f"{name}.{slot}": tensor for slot, tensor in slots.items()}
        made.effects.append(Effect("te:t5", path, up, down, 1.0 / RANK))
    return made


def flux_lokr() -> WildFile:
    """Fused qkv as BFL-dotted LoKr, which can be cut into q, k and v."""
    maker, made = Maker(), WildFile("flux")
    for number in (0, 18):
        small, large = maker.draw(96, 48), maker.draw(96, 64)
        name = f"diffusion_model.double_blocks.{number}.img_attn.qkv"
        made.tensors |= {f"{name}.lokr_w1": small, f"{name}.lokr_w2": large, f"{name}.alpha": torch.tensor(1.0)}
        delta = torch.kron(small, large)
        for piece, part in zip(delta.split(WIDTH), ("to_q", "to_k", "to_v"), strict=True):
            path = f"transformer_blocks.{number}.attn.{part}"
            made.effects.append(Effect("denoiser", path, piece, torch.eye(WIDTH)))
    return made


# ---------------------------------------------------------------- Stable Diffusion 3 (medium: width 1536)
def sd3_kohya() -> WildFile:
    """lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight."""
    maker, made = Maker(), WildFile("sd3")
    width = 1536
    for number in range(24):
        own, block = f"joint_blocks.{number}", f"transformer_blocks.{number}"
        layers = [
            FluxLayer(f"{own}.x_block.attn.qkv", width, tuple((f"{block}.attn.to_{x}", width) for x in "qkv")),
            FluxLayer(f"{own}.x_block.attn.proj", width, ((f"{block}.attn.to_out.0", width),)),
            FluxLayer(f"{own}.x_block.mlp.fc1", width, ((f"{block}.ff.net.0.proj", 4 * width),)),
            FluxLayer(
                f"{own}.context_block.attn.qkv", width, tuple((f"{block}.attn.add_{x}_proj", width) for x in "qkv")
            ),
        ]
        part = flux_original(tuple(layers), flux_kohya_key)
        maker.alpha()
        made.tensors |= part.tensors
        made.effects += part.effects
    return made


CASES: dict[str, Callable[[], WildFile]] = {
    "SD kohya, one alpha": lambda: stable_diffusion(kohya_key, alphas=1.0),
    "SD kohya, alpha per module": lambda: stable_diffusion(kohya_key),
    "SD kohya + embedding bundle": lambda: with_bundle(stable_diffusion(kohya_key, alphas=1.0)),
    "SD kohya DoRA": lambda: with_dora(stable_diffusion(kohya_key, alphas=1.0), "dora_scale"),
    "SD LoHa": lambda: sd_products("loha"),
    "SD LoKr": lambda: sd_products("lokr"),
    "SD lycoris_ names": lambda: stable_diffusion(lycoris_key, alphas=1.0, text=False),
    "SD oldest diffusers, no prefix": lambda: stable_diffusion(
        old_diffusers_key, alphas=False, text=False, layers=tuple(item for item in SD_LAYERS if ".attn" in item[0])
    ),
    "SD PEFT dump (.default.)": lambda: stable_diffusion(adapter_key, alphas=False),
    "SD base_model.model.": lambda: stable_diffusion(peft_key, alphas=False, text=False),
    "SD unet.base_model.model.": lambda: stable_diffusion(compound_key, alphas=False, text=False),
    "SDXL kohya": lambda: stable_diffusion(kohya_sdxl_key, alphas=1.0, layers=SDXL_LAYERS, pipeline="sdxl"),
    "SDXL kohya, alpha per module": lambda: stable_diffusion(kohya_sdxl_key, layers=SDXL_LAYERS, pipeline="sdxl"),
    "SDXL both spellings": lambda: stable_diffusion(mixed_sdxl_key, 1.0, layers=SDXL_LAYERS, pipeline="sdxl"),
    "SD3 kohya": sd3_kohya,
    "FLUX kohya": lambda: flux_original(flux_layers(), flux_kohya_key),
    "FLUX kohya, input and output layers": lambda: flux_original(FLUX_TOP, flux_kohya_key),
    "FLUX kohya + T5": lambda: with_t5(flux_original(flux_layers(), flux_kohya_key), "lora_te3_"),
    "FLUX BFL dotted": lambda: flux_original(flux_layers(), flux_comfy_key),
    "FLUX BFL dotted LoKr": flux_lokr,
    "FLUX fal (base_model.model. + BFL)": lambda: flux_original(flux_layers(modulation=False), flux_fal_key),
    "FLUX base_model.model.": lambda: flux_diffusers(peft_flux_key, alphas=False),
    "FLUX diffusers without proj_mlp": lambda: flux_diffusers(diffusers_flux_key, alphas=False, skip="proj_mlp"),
    "FLUX OneTrainer": lambda: flux_diffusers(onetrainer_key, alphas=True),
    "FLUX OneTrainer + T5": lambda: with_t5(flux_diffusers(onetrainer_key, alphas=True), "lora_te2_"),
    "FLUX OneTrainer DoRA": lambda: with_dora(flux_diffusers(onetrainer_key, alphas=True), "dora_scale"),
    "FLUX XLabs, double blocks": lambda: flux_original(
        tuple(item for item in flux_layers(single=False) if "_attn." in item.name), xlabs_key
    ),
}
