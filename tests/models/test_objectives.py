"""Families on tiny models of the real classes: losses and gradients by the formulas, checkpointing, learning."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from tests import tiny
from vislora.inject.injection import eject
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.models.base import load_family
from vislora.registry import FAMILIES
from vislora.training.loss import DenoisingLoss, LossOptions

torch.set_num_threads(1)
CPU = torch.device("cpu")
NAMES = [*FAMILIES, "sd-v"]
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085**0.5, 0.012**0.5)}
SIZES = {"original_size": [[40, 30], [16, 16]], "crop_top_left": [[3, 0], [0, 0]], "target_size": [[16, 16], [16, 16]]}
PROMPTS = ["a red cat", "the house"]


@pytest.fixture(params=NAMES)
def trainee(request):
    """Return (family, its adapter's parameters, loss module, batch); the adapter is taken off afterwards."""
    family = load_family(tiny.saved(request.param), torch.float32, CPU)
    denoiser = family.components["denoiser"]
    layers = select(denoiser, [], "all", Target("", 4))
    adapters = inject_fresh(denoiser, "t", layers, FreshOptions(seed=1))
    with torch.no_grad():
        text = family.encode_prompt(PROMPTS)
    channels = family.encode_image(torch.zeros(1, 3, tiny.side(request.param), tiny.side(request.param))).shape[1]
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))
    yield (
        family,
        adapters,
        DenoisingLoss(family, {"denoiser": adapters}, LossOptions()),
        {
            "latents": latents,
            "text": text,
            **{name: torch.tensor(values) for name, values in SIZES.items()},
        },
    )
    eject(denoiser, "t")


def gradients(module, loss):
    module.zero_grad(set_to_none=True)
    loss.backward()
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def reference(family, batch):
    """Return the loss from the formulas alone, with the draws that a step makes: noise first, then timesteps."""
    draw = torch.Generator().manual_seed(5)
    x, noise = batch["latents"], torch.randn(batch["latents"].shape, generator=draw)
    if family.objective.prediction == "flow":
        shift = family.objective.shift
        shift = shift if isinstance(shift, float) else shift.of(8, 8)
        u = torch.randn(2, generator=draw).sigmoid()
        sigma = (shift * u / (1 + (shift - 1) * u)).view(2, 1, 1, 1)
        noisy, target, t = (1 - sigma) * x + sigma * noise, noise - x, 1000 * sigma.flatten()
    else:
        t = torch.randint(1000, (2,), generator=draw)
        kind = family.pipeline.scheduler.config.beta_schedule
        betas = torch.linspace(*BETAS[kind], 1000, dtype=torch.float64) ** (2 if kind == "scaled_linear" else 1)
        abar = (1 - betas).cumprod(0).float()[t].view(2, 1, 1, 1)
        noisy, target = abar.sqrt() * x + (1 - abar).sqrt() * noise, noise
        if family.objective.prediction == "v":
            target = abar.sqrt() * noise - (1 - abar).sqrt() * x
    sizes = torch.cat([torch.tensor(values) for values in SIZES.values()], 1)
    return mse_loss(family.predict(noisy, t, {**batch["text"], "sizes": sizes}), target)


def test_loss_and_gradients_are_those_of_the_formulas(trainee):
    family, _, module, batch = trainee
    loss = module(batch, torch.Generator().manual_seed(5))
    mine = gradients(module, loss)
    expected = reference(family, batch)
    theirs = gradients(module, expected)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-7
    assert sum(float(one.abs().sum()) for one in mine) > 0


def test_gradient_checkpointing_changes_no_gradient(trainee):
    family, _, module, batch = trainee
    denoiser = family.components["denoiser"]
    plain = gradients(module, module(batch, torch.Generator().manual_seed(5)))
    denoiser.enable_gradient_checkpointing()
    denoiser.train()  # diffusers' blocks recompute in training mode or when gradients are on
    again = gradients(module, module(batch, torch.Generator().manual_seed(5)))
    denoiser.eval()
    for one, other in zip(plain, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "told"), [("sdxl", [0, 1, 2, 3, 4, 5]), ("sdxl-refiner", [0, 1, 2, 3])])
def test_sdxl_is_told_the_sizes_of_each_image(name, told):
    family = load_family(tiny.saved(name), torch.float32, CPU)
    seen = {}
    denoiser = family.components["denoiser"]
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        text = family.encode_prompt(PROMPTS)
        sizes = torch.cat([torch.tensor(values) for values in SIZES.values()], 1)
        one = family.predict(torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), {**text, "sizes": sizes})
        ids = seen["added_cond_kwargs"]["time_ids"]
        other = family.predict(torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), text)
    hook.remove()
    assert torch.equal(ids[:, : len(told)], sizes[:, told].float())
    assert name == "sdxl" or ids[:, 4].tolist() == [6.0, 6.0]
    assert not torch.equal(one[0], other[0])
    assert torch.equal(seen["added_cond_kwargs"]["time_ids"][0, :4], torch.tensor([16.0, 16.0, 0.0, 0.0]))


@pytest.mark.quick("sd", "flux")
def test_an_image_is_learnt(trainee):
    """The loss on one image falls, on draws that training has not seen."""
    _, _, module, batch = trainee

    def measured():
        with torch.no_grad():
            return sum(float(module(batch, torch.Generator().manual_seed(10_000 + n))) for n in range(16)) / 16

    before = measured()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    for step in range(100):
        optimizer.zero_grad()
        module(batch, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert measured() < 0.92 * before
