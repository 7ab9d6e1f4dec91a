"""What kohya's metadata says of the modules: sd-scripts' module, rank, alpha and arguments."""

from __future__ import annotations

import json

import pytest
import torch

from vislora.formats.adapter_file import AdapterModule
from vislora.formats.kohya import network_keys


def module(algo, tensors, alpha=None, **fields):
    return AdapterModule(component="denoiser", path="a", algo=algo, tensors=tensors, alpha=alpha, **fields)


def lora(rank=4, alpha=2.0, kernel=(), more=(), **fields):
    tensors = {"down": torch.zeros(rank, 8, *kernel), "up": torch.zeros(8, rank, *[1] * len(kernel))}
    return module("lora", {**tensors, **dict(more)}, alpha, **fields)


def dora(axis):
    return lora(magnitude=torch.ones(8), magnitude_axis=axis)


def of_dora(on_output):
    return {"algo": "lora", "dora_wd": "True", "wd_on_output": on_output}


LOHA = module("loha", {f"hada_w{n}_{part}": torch.zeros(4, 4) for n in "12" for part in "ab"}, 1.0)
OFT = module("oft", {"oft_blocks": torch.zeros(2, 4, 4)}, 0.0, rule="own")
IA3 = module("ia3", {"weight": torch.zeros(8), "on_input": torch.tensor(False)}, rule="own")
CONV = {"conv_dim": "4", "conv_alpha": "2.0"}
CASES = {
    "plain": ([lora(), lora()], "flux", ("networks.lora_flux", "4", "2.0", {})),
    "of no known family": ([lora()], None, ("networks.lora", "4", "2.0", {})),
    "without alpha": ([lora(alpha=None)], "sd", ("networks.lora", "4", "4.0", {})),
    "several ranks": ([lora(), lora(rank=8)], "sd", ("networks.lora", "Dynamic", "2.0", {})),
    "several alphas": ([lora(), lora(alpha=None)], "sd", ("networks.lora", "4", "Dynamic", {})),
    "a 1 x 1 conv": ([lora(kernel=(1, 1))], "sd", ("networks.lora", "4", "2.0", {})),
    "a conv": ([lora(kernel=(3, 3))], "sd", ("networks.lora", "4", "2.0", CONV)),
    "dora": ([dora("out")], "sd", ("lycoris.kohya", "4", "2.0", of_dora("True"))),
    "dora of inputs": ([dora("in")], "sd", ("lycoris.kohya", "4", "2.0", of_dora("False"))),
    "tucker": (
        [lora(more={"mid": torch.zeros(4, 4, 3, 3)})],
        "sd",
        ("lycoris.kohya", "4", "2.0", {"algo": "lora", "use_tucker": "True"}),
    ),
    "tucker in loha": (
        [module("loha", {**LOHA.tensors, "hada_t1": torch.zeros(4, 4, 3, 3), "hada_t2": torch.zeros(4, 4, 3, 3)})],
        "sd",
        ("lycoris.kohya", "4", "4.0", {"algo": "loha", "use_tucker": "True"}),
    ),
    "loha": ([LOHA], "flux", ("lycoris.kohya", "4", "1.0", {"algo": "loha"})),
    "oft": ([OFT], "sd", ("lycoris.kohya", None, None, {"algo": "diag-oft"})),
    "lora beside loha": ([lora(), LOHA], "sd", ("lycoris.kohya", "4", "Dynamic", {})),
    "lora beside ia3": ([lora(), IA3], "sd", ("lycoris.kohya", "4", "2.0", {})),
}


@pytest.mark.parametrize("what", CASES)
def test_they_are_what_the_modules_are(what):
    modules, family, expected = CASES[what]
    found = network_keys(modules, family)
    *names, arguments = (found.get(f"ss_network_{name}") for name in ("module", "dim", "alpha", "args"))
    assert (*names, json.loads(arguments)) == expected
