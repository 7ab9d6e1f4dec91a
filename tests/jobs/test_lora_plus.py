"""LoRA+ (arXiv 2402.12354): what starts at zero learns at a multiple of the rate."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs.train_helpers import trained

ONE_STEP = {"loop__steps": 1, "optimizer__name": "sgd", "optimizer__weight_decay": 0.0, "optimizer__max_grad_norm": 1e9}
ONE_STEP |= {"optimizer__schedule": "constant"}


def made(root, family, ratio, settings):
    """Train with this ratio; return the adapter's tensors."""
    path = root / str(ratio)
    value, _ = trained(root, family, **settings, output=path, name="a", optimizer__lora_plus_ratio=ratio)
    return load_file(value.path)


@pytest.mark.quick("loha-True", "lora-False")
@pytest.mark.parametrize("text_encoders", [False, True])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_a_step_is_longer_by_the_ratio_for_them_alone(tmp_path, algorithm, text_encoders):
    family = "sd" if text_encoders or algorithm != "lora" else "sd3"
    settings = {**ONE_STEP, "adapter__algorithm": algorithm, "adapter__text_encoders": text_encoders}
    plain, more = (made(tmp_path, family, ratio, settings) for ratio in (1.0, 4.0))
    ratios = []
    for name, one in plain.items():
        if torch.equal(one, more[name]):
            continue  # at first only what is zero has a gradient
        assert torch.allclose(more[name], 4.0 * one, rtol=1e-4, atol=1e-9)
        ratios.append(name)
    assert len(ratios) >= len({name.split(".")[0] for name in plain}) / 2
    if text_encoders:
        assert any(name.startswith("lora_te") for name in ratios)


def test_the_others_learn_at_the_rate(tmp_path):
    settings = {**ONE_STEP, "loop__steps": 2}
    once, plain, more = (made(tmp_path, "sd3", *which) for which in ((2.0, ONE_STEP), (1.0, settings), (4.0, settings)))
    ratios = []
    for name in (name for name in once if "lora_down" in name):
        # the second step's gradient went through an up projection that is four times as large
        one, other = plain[name] - once[name], more[name] - once[name]
        ratios.append(float((one * other).sum() / (one * one).sum()))
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(4.0, rel=0.1)  # were their rate higher too, it would be 16


def test_a_layer_without_weights_keeps_its_magnitude_apart():
    from torch import nn

    from vislora.inject.targets import Target
    from vislora.inject.trained import FreshOptions, inject_fresh

    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    adapters = inject_fresh(model, "fresh", {"0": Target("", 2)}, FreshOptions(dora=True))
    assert not adapters.magnitudes()[0].any()
    assert [parameter.shape for parameter in adapters.ups()] == [(4, 2)]
