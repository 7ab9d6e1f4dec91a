"""Fused and reordered layers of every family that has such, and slots of every kind that such a layer can have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vislora.formats.names import FAMILY_NAMES

IN, UNIT = 8, 12


@dataclass(frozen=True)
class Layer:
    """A layer of the original tree, by its flat name. shares: the rows of its parts; a reordered layer has none."""

    family: str
    flat: str
    paths: tuple[str, ...]
    shares: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        return UNIT * sum(self.shares) if self.shares else 2 * IN

    @property
    def rows(self) -> list[Tensor]:
        """Return the rows of the stored layer that every path has, in its order."""
        every = torch.arange(self.outputs)
        if not self.shares:
            return [every.roll(self.outputs // 2)]
        return list(every.split([UNIT * share for share in self.shares]))


_SINGLE = "single_transformer_blocks.37"
ALL_LAYERS = (
    Layer(
        "sd3",
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        tuple(f"transformer_blocks.0.attn.to_{name}" for name in "qkv"),
        (1, 1, 1),
    ),
    Layer("sd3", "lora_unet_final_layer_adaLN_modulation_1", ("norm_out.linear",)),
    Layer(
        "sd3",
        "lora_unet_joint_blocks_3_context_block_adaLN_modulation_1",
        ("transformer_blocks.3.norm1_context.linear",),
    ),
    # the last blocks: the first could be those of FLUX.2 or HunyuanVideo
    Layer(
        "flux",
        "lora_unet_double_blocks_18_img_attn_qkv",
        tuple(f"transformer_blocks.18.attn.to_{name}" for name in "qkv"),
        (1, 1, 1),
    ),
    Layer(
        "flux",
        "lora_unet_single_blocks_37_linear1",
        (f"{_SINGLE}.attn.to_q", f"{_SINGLE}.attn.to_k", f"{_SINGLE}.attn.to_v", f"{_SINGLE}.proj_mlp"),
        (1, 1, 1, 4),
    ),
    Layer("flux", "lora_unet_final_layer_adaLN_modulation_1", ("norm_out.linear",)),
)
LAYERS = {f"{item.family}-{item.flat[10:]}": item for item in ALL_LAYERS if item.family in FAMILY_NAMES}


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Return small whole numbers, whose sums of products are exact in whatever order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed + sum(shape))).float()


def slots(kind: str, out: int) -> dict[str, Tensor]:
    """Return the slots of a module for a layer of `out` outputs and `IN` inputs, under the ends of kohya's keys.

    Every slot that has rows of outputs can be cut at multiples of 4.
    """
    draw = whole_numbers
    lora = {"lora_down.weight": draw(3, IN), "lora_up.weight": draw(out, 3), "alpha": torch.tensor(2.0)}
    loha = {
        f"hada_w{i}_{side}": draw(*size, seed=i) for i in (1, 2) for side, size in (("a", (out, 2)), ("b", (2, IN)))
    }
    glora = {"a1": draw(IN, 2), "a2": draw(2, IN), "b1": draw(out, 2), "b2": draw(2, IN)}
    every = {
        "lora": lora,
        "lora, zero rows": {**lora, "lora_up.weight": draw(out, 3) * (torch.arange(out) < 4)[:, None]},
        "lora, bias": {**lora, "diff_b": draw(out)},
        "dora": {**lora, "dora_scale": draw(out, 1)},
        "full": {"diff": draw(out, IN)},
        "full, bias": {"diff": draw(out, IN), "diff_b": draw(out)},
        "bias": {"diff_b": draw(out)},
        "loha": {**loha, "alpha": torch.tensor(1.0)},
        "loha, dora": {**loha, "alpha": torch.tensor(1.0), "dora_scale": draw(out, 1)},
        "lokr, full": {"lokr_w1": draw(out // 4, 2), "lokr_w2": draw(4, IN // 2), "alpha": torch.tensor(1.0)},
        "lokr, product": {
            "lokr_w1_a": draw(out // 4, 2),
            "lokr_w1_b": draw(2, 2),
            "lokr_w2_a": draw(4, 3),
            "lokr_w2_b": draw(3, IN // 2),
            "alpha": torch.tensor(3.0),
        },
        "lokr, one row": {
            "lokr_w1": draw(1, 2),
            "lokr_w2_a": draw(out, 3),
            "lokr_w2_b": draw(3, IN // 2),
            "alpha": torch.tensor(3.0),
        },
        "glora": {**{f"{name}.weight": tensor for name, tensor in glora.items()}, "alpha": torch.tensor(2.0)},
        "oft": {"oft_blocks": draw(out // 4, 4, 4) / 16, "alpha": torch.tensor(0.0)},
        "oft, rescaled": {"oft_blocks": draw(out // 4, 4, 4) / 16, "rescale": draw(out, 1), "alpha": torch.tensor(0.0)},
        "ia3": {"weight": draw(out), "on_input": torch.tensor(0)},
        "ia3, on input": {"weight": draw(IN), "on_input": torch.tensor(1)},
    }
    return every[kind]


KINDS = (
    "lora", "lora, zero rows", "lora, bias", "dora", "full", "full, bias", "bias", "loha", "loha, dora", "lokr, full",
    "lokr, product", "lokr, one row", "glora", "oft", "oft, rescaled", "ia3", "ia3, on input",
)  # fmt: skip
