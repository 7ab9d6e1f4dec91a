"""Bytes counted without memory are those that a real step keeps."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from tests import tiny
from tests.jobs import train_helpers
from vislora.config.train import TrainConfig
from vislora.inject.injection import eject
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.jobs.memory import GIB, MIB, Estimate, Step, estimate, memory_notes, size_text
from vislora.jobs.train import run
from vislora.models.base import load_family
from vislora.models.words import LearnedWords
from vislora.records import Progress
from vislora.registry import TRAINED
from vislora.training.loss import DenoisingLoss, LossOptions
from vislora.training.memory import kept_bytes, module_bytes, optimizer_bytes

torch.set_num_threads(1)
CPU = torch.device("cpu")
# not Lumina 2 and others, whose transformers read lengths out of masks
FORESEEN = ["sd", "sdxl", "flux", "auraflow", "sana", "z-image", "flux2", "qwen-image"]


def made(name, batch=2, rank=4, preset="all", algorithm="lora"):
    """Return a family and what its step is made of."""
    family = load_family(tiny.saved(name), torch.float32, CPU)
    side = tiny.side(name)
    with torch.no_grad():
        latents = family.encode_image(torch.zeros(batch, 3, side, side))
        text = family.encode_prompt(["a red cat"] * batch)
    chosen = {"denoiser": select(family.components["denoiser"], [], preset, Target("", rank, algorithm=algorithm))}
    return family, Step(chosen, FreshOptions(), LossOptions(), {"latents": latents, "text": text}, "adamw")


def really_kept(family, step, others=frozenset()):
    """Return the bytes that autograd keeps of a step on the CPU, but the denoiser's own weights, and `others`."""
    denoiser = family.components["denoiser"]
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*denoiser.parameters(), *denoiser.buffers()]}
    weights |= others
    adapters = inject_fresh(denoiser, "real", step.chosen["denoiser"], step.fresh)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights |= {parameter.untyped_storage().data_ptr() for parameter in adapters.parameters()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        DenoisingLoss(family, {"denoiser": adapters}, step.loss)(step.batch, torch.Generator().manual_seed(0))
    eject(denoiser, "real")
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("name", FORESEEN)
def test_what_is_kept_is_counted_without_memory(name):
    family, step = made(name)
    real = really_kept(family, step)
    assert estimate(family, step).activations == pytest.approx(real, rel=0.1)


@pytest.mark.quick("oft", "lokr")
@pytest.mark.parametrize("algorithm", [name for name in TRAINED if name != "lora"])
def test_so_it_is_with_every_algorithm(algorithm):
    family, step = made("sd", algorithm=algorithm)
    real = really_kept(family, step)
    assert estimate(family, step).activations == pytest.approx(real, rel=0.1)


@pytest.mark.quick("sd")
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_text_encoders_that_read_learned_words_keep_theirs_too(name):
    family, plain = made(name)
    words = ["a red cat"] * 2
    step = replace(plain, batch={**plain.batch, "text": None, "captions": words}, readers=[*family.components][1:])
    foreseen = estimate(family, step).activations
    learned = LearnedWords(family.pipeline, "real", {"cat": (2, "")})
    weights = {
        tensor.untyped_storage().data_ptr() for part in family.components.values() for tensor in part.parameters()
    }
    real = really_kept(family, step, weights)
    learned.close()
    assert foreseen == pytest.approx(real, rel=0.1)
    assert foreseen > estimate(family, plain).activations


def test_the_parts_are_exact():
    family, step = made("sdxl")
    found = estimate(family, step)
    assert found.weights["denoiser"] == module_bytes(family.components["denoiser"])
    assert list(found.weights) == ["denoiser", "vae", "te:clip_l", "te:clip_g"]
    adapters = inject_fresh(family.components["denoiser"], "real", step.chosen["denoiser"], step.fresh)
    assert found.adapter == 2 * module_bytes(adapters)
    optimizer = torch.optim.AdamW(adapters.parameters())
    for parameter in adapters.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values()]
    assert found.optimizer == sum(value.nbytes for value in state)
    assert found.total == sum(found.weights.values()) + found.adapter + found.optimizer + found.activations
    eject(family.components["denoiser"], "real")


def test_the_base_is_as_it_was():
    family, step = made("sd")
    before = {name: value.clone() for name, value in family.components["denoiser"].state_dict().items()}
    estimate(family, step)
    after = family.components["denoiser"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.quick("flux")
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_settings_change_it_as_they_change_the_run(name):
    plain = estimate(*made(name))
    assert estimate(*made(name, batch=4)).activations == pytest.approx(2 * plain.activations, rel=0.25)
    assert estimate(*made(name, rank=8)).adapter == 2 * plain.adapter
    assert estimate(*made(name, preset="attention")).adapter < plain.adapter
    family, step = made(name)
    family.components["denoiser"].enable_gradient_checkpointing()
    family.components["denoiser"].train()
    assert estimate(family, step).activations < plain.activations
    half = made(name)
    bfloat = load_family(tiny.saved(name), torch.bfloat16, CPU)
    assert estimate(bfloat, half[1]).weights["denoiser"] == plain.weights["denoiser"] // 2
    assert estimate(bfloat, half[1]).activations < 0.9 * plain.activations


def test_attention_keeps_no_table_of_all_pairs():
    counts = []
    for tokens in (512, 1024):
        x = torch.zeros(1, 2, tokens, 16, device="meta", requires_grad=True)
        counts.append(kept_bytes(lambda x=x: scaled_dot_product_attention(x, x, x), []))
    assert counts == [2 * tokens * (2 * 16 * 4 + 4) for tokens in (512, 1024)]  # x, as much, and a number per row


def test_shared_storage_counts_once():
    layer = nn.Linear(8, 8, device="meta")
    x = torch.zeros(4, 8, device="meta", requires_grad=True)
    kept = kept_bytes(lambda: layer(x) * layer(x), layer.parameters())
    assert kept == 3 * 4 * 8 * 4  # x, and two results


def test_optimizers_have_states_of_their_own():
    parameters = [nn.Parameter(torch.zeros(4, 8)) for _ in range(3)]
    assert optimizer_bytes("sgd", parameters) < optimizer_bytes("adamw", parameters)
    assert optimizer_bytes("adamw", parameters) == 3 * (2 * 4 * 8 * 4 + 4)


@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_run_says_it_before_its_first_step(text_encoders, tmp_path):
    records = []
    for record in run(train_helpers.config(tmp_path, "sd", adapter__text_encoders=text_encoders)):
        if isinstance(record, Progress) and record.task == "training":
            break
        records.append(record)
    (said,) = [line for line in train_helpers.notes(records).splitlines() if line.startswith("memory")]
    parts = re.findall(r"([a-z_:]+) [\d.]+ MiB", said.split("MiB:", 1)[1])
    assert parts == ["denoiser", "vae", "te:clip_l", "adapter", "optimizer", "activations"]


def test_too_little_memory_is_a_warning_that_names_what_helps(tmp_path):
    found = Estimate({"denoiser": 4 * GIB}, 20 * MIB, 20 * MIB, 2 * GIB)
    config = TrainConfig.of({"output": tmp_path, "data": {"folder": tmp_path}, "loop": {"batch_size": 2}})
    assert [note.level for note in memory_notes(found, None, config)] == ["info"]
    assert [note.level for note in memory_notes(found, 3 * GIB, config)] == ["info"]
    said, warned = memory_notes(found, GIB, config)
    assert said.text.startswith("memory (estimated): 6.04 GiB: denoiser 4.00 GiB, adapter 20.0 MiB")
    assert "2.04 GiB beside the weights, 1.00 GiB are free" in warned.text
    assert "--gradient-checkpointing, --quantize int8 or nf4, a smaller --batch-size" in warned.text
    assert size_text(3 * MIB) == "3.0 MiB"
