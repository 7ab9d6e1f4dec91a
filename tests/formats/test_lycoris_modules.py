"""Every kind and option of LyCORIS: what its own modules compute, against the delta of the file that they save."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.formats.format_helpers import same_tensors
from vislora import formats
from vislora.algebra.compare import compare
from vislora.algorithms.base import apply_weight
from vislora.formats import AdapterFile

lycoris = pytest.importorskip("lycoris.modules")
LAYERS = {
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": lambda: nn.Linear(24, 16, bias=False),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": lambda: nn.Linear(16, 64),
    "mid_block.attentions.0.proj_in": lambda: nn.Conv2d(16, 32, 1),
    "mid_block.resnets.0.conv1": lambda: nn.Conv2d(32, 16, 3, padding=1),
}
NORMS = {
    "mid_block.attentions.0.norm": lambda: nn.GroupNorm(4, 16),
    "mid_block.attentions.0.transformer_blocks.0.norm1": lambda: nn.LayerNorm(16),
}
INPUTS = {"Linear": (3, -1), "Conv2d": (2, -1, 5, 6), "GroupNorm": (2, 16, 5, 6), "LayerNorm": (3, 16)}
# class of the module, its settings, kind of the file's modules
KINDS = {
    "lora": ("LoConModule", {}, "lora"),
    "lora-tucker": ("LoConModule", {"use_tucker": True}, "lora"),
    "lora-scalar": ("LoConModule", {"use_scalar": True}, "lora"),
    "lora-rank-stabilised": ("LoConModule", {"rs_lora": True}, "lora"),
    "dora-out": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}, "lora"),
    "dora-in": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}, "lora"),
    "dora-tucker": ("LoConModule", {"weight_decompose": True, "use_tucker": True}, "lora"),
    "loha": ("LohaModule", {}, "loha"),
    "loha-tucker": ("LohaModule", {"use_tucker": True}, "loha"),
    "loha-scalar": ("LohaModule", {"use_scalar": True, "rs_lora": True}, "loha"),
    "loha-dora-in": ("LohaModule", {"weight_decompose": True, "wd_on_out": False}, "loha"),
    "lokr": ("LokrModule", {"lora_dim": 2, "factor": 4}, "lokr"),
    "lokr-tucker": ("LokrModule", {"lora_dim": 1, "use_tucker": True, "factor": 4}, "lokr"),
    "lokr-both": ("LokrModule", {"lora_dim": 1, "decompose_both": True, "use_scalar": True, "factor": 4}, "lokr"),
    "lokr-full": ("LokrModule", {"full_matrix": True}, "lokr"),
    "lokr-rank-stabilised": ("LokrModule", {"lora_dim": 2, "rs_lora": True, "factor": 2}, "lokr"),
    "lokr-dora-out": ("LokrModule", {"lora_dim": 2, "weight_decompose": True, "factor": 4}, "lokr"),
    "lokr-dora-in": ("LokrModule", {"weight_decompose": True, "wd_on_out": False}, "lokr"),
    "lokr-unbalanced": ("LokrModule", {"unbalanced_factorization": True, "factor": 4}, "lokr"),
    "full": ("FullModule", {}, "full"),
    "norm": ("NormModule", {}, "norm"),
    "glora": ("GLoRAModule", {}, "glora"),
    "glora-scalar": ("GLoRAModule", {"use_scalar": True}, "glora"),
    "oft": ("DiagOFTModule", {}, "oft"),
    "oft-constrained": ("DiagOFTModule", {"constraint": 0.002}, "oft"),
    "oft-rescaled": ("DiagOFTModule", {"rescaled": True, "lora_dim": 8}, "oft"),
    "boft": ("ButterflyOFTModule", {}, "boft"),
    "boft-constrained": ("ButterflyOFTModule", {"constraint": 0.003}, "boft"),
    "boft-rescaled": ("ButterflyOFTModule", {"rescaled": True, "lora_dim": 8}, "boft"),
    "ia3": ("IA3Module", {}, "ia3"),
    "ia3-on-input": ("IA3Module", {"train_on_input": True}, "ia3"),
}
EVERY = pytest.mark.parametrize("label", KINDS)


class Made:
    """Layers, LyCORIS modules on them with numbers in every parameter, and the tensors that they save."""

    def __init__(self, label: str) -> None:
        name, settings, _ = KINDS[label]
        torch.manual_seed(0)
        chosen = NORMS if name == "NormModule" else LAYERS
        # LyCORIS inverts in float32 and mixes no dtypes
        dtype = torch.float32 if "oft" in label else torch.float64
        self.layers = {path: make().to(dtype) for path, make in chosen.items()}
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            flat = f"lycoris_{path.replace('.', '_')}"
            given = {"lora_dim": 4, "alpha": 2.0, **settings}
            module = getattr(lycoris, name)(flat, layer, 1.0, **given).to(dtype)
            for parameter in module.parameters():
                parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
            self.modules[path] = module
            self.tensors |= {f"{flat}.{slot}": tensor.detach() for slot, tensor in saved(module).items()}


def saved(module: nn.Module) -> dict[str, Tensor]:
    """Return what LyCORIS saves of a module; `full` does so once it is applied, when it holds the whole weight."""
    if type(module).__name__ != "FullModule":
        return dict(module.state_dict())
    found = {"diff": module.weight}
    return found if module.bias is None else {**found, "diff_b": module.bias}


def written(made: Made, path) -> AdapterFile:
    save_file({key: tensor.contiguous().clone() for key, tensor in made.tensors.items()}, path)
    return formats.load(path)


def changed(layer: nn.Module, x: Tensor, adapter: AdapterFile, path: str) -> Tensor:
    """Compute the layer with the adapter's deltas added to its weight and bias."""
    bias, more = layer.bias, adapter.bias_delta(path)
    bias = bias if more is None else more if bias is None else bias + more
    weight = (layer.weight + adapter.delta(path, layer.weight.detach())).to(x.dtype)
    if isinstance(layer, nn.GroupNorm):
        return nn.functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return apply_weight(layer, x, weight, bias)


def picture(layer: nn.Module) -> Tensor:
    width = getattr(layer, "in_features", getattr(layer, "in_channels", 16))
    size = [width if side == -1 else side for side in INPUTS[type(layer).__name__]]
    return torch.randn(size).to(layer.weight.dtype)


@EVERY
def test_the_delta_is_what_lycoris_computes(label, tmp_path):
    made = Made(label)
    adapter = written(made, tmp_path / "a.safetensors")
    assert {item.algo for item in adapter.modules} == {KINDS[label][2]}
    assert not adapter.extras
    for path, layer in made.layers.items():
        x = picture(layer)
        expected = made.modules[path](x)
        # LyCORIS counts an epsilon of float32 in DoRA's norms
        torch.testing.assert_close(changed(layer, x, adapter, path), expected, rtol=1e-6, atol=4e-6)
        assert (expected - layer(x)).abs().max() > 1e-2


@EVERY
def test_a_kohya_file_holds_it_bit_for_bit(label, tmp_path):
    made = Made(label)
    adapter = written(made, tmp_path / "a.safetensors")
    formats.save(adapter, tmp_path / "b.safetensors", "kohya")
    # alpha is written as float32, which holds it exactly; OFT's is no alpha but a slot like others
    renamed = {
        key.replace("lycoris_", "lora_unet_"): tensor.float() if "alpha" in key and "oft" not in label else tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    same_tensors(tmp_path / "b.safetensors", renamed)
    assert compare(adapter, formats.load(tmp_path / "b.safetensors")).exact
