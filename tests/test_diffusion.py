from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from vislora.diffusion import Discrete, Flow, Timesteps

torch.set_num_threads(1)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 250, 999])


def drawn(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, 8, 8, generator=draw), torch.randn(4, 4, 8, 8, generator=draw)


def discrete(kind, **changes):
    scheduler = DDPMScheduler(**SCHEDULE, **changes)
    return scheduler, Discrete(scheduler.alphas_cumprod, kind)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_targets_are_those_of_diffusers(kind, zero_snr):
    scheduler, objective = discrete(kind, rescale_betas_zero_snr=zero_snr)
    latents, noise = drawn()
    assert torch.equal(objective.add_noise(latents, noise, T), scheduler.add_noise(latents, noise, T))
    expected = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, T)
    assert torch.equal(objective.target(latents, noise, T), expected)


def test_low_precision_latents_stay_in_their_precision():
    _, objective = discrete("v")
    latents, noise = (tensor.bfloat16() for tensor in drawn())
    assert objective.add_noise(latents, noise, T).dtype == torch.bfloat16
    assert objective.target(latents, noise, T).dtype == torch.bfloat16


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(gamma):
    scheduler, epsilon = discrete("epsilon")
    _, velocity = discrete("v")
    for index, t in enumerate(T.tolist()):
        abar = scheduler.alphas_cumprod[t].item()
        snr = abar / (1 - abar)
        least = min(snr, gamma)
        assert epsilon.weight(T, gamma)[index].item() == pytest.approx(least / snr, rel=1e-4)
        assert velocity.weight(T, gamma)[index].item() == pytest.approx(least / (snr + 1), rel=1e-4)


def test_no_gamma_means_that_all_timesteps_count_alike():
    for objective in (discrete("epsilon")[1], discrete("v")[1]):
        assert objective.weight(T, None).tolist() == [1.0] * 4
    assert Flow().weight(T.float(), 5.0).tolist() == [1.0] * 4


def test_weights_are_finite_at_both_ends_of_a_schedule_that_ends_in_pure_noise():
    for kind in ("epsilon", "v"):
        _, objective = discrete(kind, rescale_betas_zero_snr=True)
        assert objective.weight(T, 5.0).isfinite().all()


def test_every_timestep_is_drawn_and_none_beyond():
    _, objective = discrete("epsilon")
    t = objective.sample_t((20_000,), torch.Generator().manual_seed(0))
    assert (t.min().item(), t.max().item()) == (0, 999)
    assert torch.equal(t, objective.sample_t((20_000,), torch.Generator().manual_seed(0)))
    assert len(t.unique()) == 1000


@pytest.mark.parametrize("distribution", [None, "uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [0.25, 4.0])
def test_timesteps_are_drawn_as_told_whatever_the_base_was_trained_with(distribution, shift):
    how = Timesteps(distribution, shift)
    middle = shift * 0.5 / (1 + (shift - 1) * 0.5)  # both distributions have their median at 0.5
    for objective in (discrete("epsilon")[1], Flow()):
        t = objective.sample_t((20_000,), torch.Generator().manual_seed(0), how)
        assert t.median().item() == pytest.approx(1000 * middle, abs=20)
        assert 0 <= t.min() < t.max() < 1000
        quartile = (
            0.25 if (distribution or usual(objective)) == "uniform" else torch.sigmoid(torch.tensor(-0.6745)).item()
        )
        expected = shift * quartile / (1 + (shift - 1) * quartile)
        assert t.float().quantile(0.25).item() == pytest.approx(1000 * expected, abs=20)


def usual(objective):
    return "logit-normal" if objective.prediction == "flow" else "uniform"


def test_the_shift_of_the_settings_comes_on_top_of_the_objectives():
    both, one = (Flow(3.0), Timesteps(shift=0.5)), (Flow(1.5), Timesteps())
    drawn = [flow.sample_t((64,), torch.Generator().manual_seed(0), how) for flow, how in (both, one)]
    assert torch.allclose(*drawn, rtol=1e-5)


def test_flow_is_the_straight_line_of_diffusers_flow_training():
    latents, noise = drawn()
    t = torch.tensor([0.0, 100.0, 500.0, 1000.0])
    sigma = (t / 1000).view(4, 1, 1, 1)
    assert torch.equal(Flow().add_noise(latents, noise, t), (1.0 - sigma) * latents + sigma * noise)
    assert torch.equal(Flow().target(latents, noise, t), noise - latents)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_timesteps_are_logit_normal_and_shifted(shift):
    t = Flow(shift).sample_t((4096,), torch.Generator().manual_seed(3))
    u = torch.sigmoid(torch.randn(4096, generator=torch.Generator().manual_seed(3)))
    assert torch.allclose(t / 1000, shift * u / (1 + (shift - 1) * u))
    assert 0 < t.min() < t.max() < 1000
    assert t.median().item() / 1000 == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=0.02)


def test_flow_noise_levels_move_as_the_sampler_moves_them():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.linspace(1, 1000, 1000).flip(0) / 1000
    assert torch.allclose(scheduler.sigmas, 3.0 * u / (1 + 2.0 * u), atol=1e-6)
