"""What a training step does without lies in main memory, and comes back for the samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from tests.jobs.train_helpers import config, trained
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions
from vislora.jobs import train as job
from vislora.jobs.memory import Step, estimate
from vislora.models.base import load_family
from vislora.models.quantized import quantize
from vislora.models.resting import CPU, Resting, all_but_denoiser
from vislora.training.loss import LossOptions

GPU = torch.device("cuda")  # it is only named, nothing is moved there


class Moved(nn.Module):
    """Remembers where it was moved."""

    def __init__(self, journal):
        super().__init__()
        self.journal = journal

    def to(self, device):
        self.journal.append(str(device))
        return self


def test_parts_are_on_the_device_while_they_work():
    journal = []
    resting = Resting({"vae": Moved(journal)}, GPU)
    resting.rest()
    with resting.at_work():
        journal.append("works")
    with pytest.raises(KeyError), resting.at_work():
        raise KeyError
    assert journal == ["cpu", "cuda", "works", "cpu", "cuda", "cpu"]


def test_all_but_the_denoiser_can_rest():
    family = load_family(tiny.saved("flux"), torch.float32, CPU)
    assert set(all_but_denoiser(family, GPU).parts) == {"text_encoder", "text_encoder_2", "vae"}
    assert not all_but_denoiser(family, CPU).parts


@pytest.mark.usefixtures("narrow_nf4")
@pytest.mark.parametrize(("kind", "moves"), [("int8", False), ("nf4", True)])
def test_what_is_in_8_bits_stays(kind, moves):
    pytest.importorskip("bitsandbytes")
    family = load_family(tiny.saved("flux"), torch.float32, CPU)
    quantize(family.pipeline.text_encoder_2, kind, CPU)
    assert ("text_encoder_2" in all_but_denoiser(family, GPU).parts) == moves


def test_what_rests_does_not_count():
    family = load_family(tiny.saved("flux"), torch.float32, CPU)
    with torch.no_grad():
        latents = family.encode_image(torch.zeros(1, 3, tiny.side("flux"), tiny.side("flux")))
        text = family.encode_prompt(["a red cat"])
    chosen = {"denoiser": select(family.components["denoiser"], [], "attention", Target("", 4))}
    step = Step(chosen, FreshOptions(), LossOptions(), {"latents": latents, "text": text}, "adamw")
    here, away = estimate(family, step), estimate(family, step, away=all_but_denoiser(family, GPU).parts)
    assert set(here.weights) == {"denoiser", "te:clip_l", "te:t5", "vae"}
    assert away.weights == {"denoiser": here.weights["denoiser"]}
    assert here.step == away.step


def test_a_run_brings_them_back_for_samples_alone(tmp_path, monkeypatch):
    journal = []
    monkeypatch.setattr(job, "all_but_denoiser", lambda family, device: Resting({"vae": Moved(journal)}, GPU))
    monkeypatch.setattr(job, "preview", lambda *arguments: journal.append("sample"))
    fitted = job.fit
    monkeypatch.setattr(job, "fit", lambda *arguments: journal.append("steps") or fitted(*arguments))
    prepared = job.prepare_data

    def preparing(*arguments):
        journal.append("caching")
        return (yield from prepared(*arguments))

    monkeypatch.setattr(job, "prepare_data", preparing)
    monkeypatch.setattr(job, "free_bytes", lambda device: None)
    trained(tmp_path, "flux", sample={"every": 4})
    assert journal == ["caching", "cpu", "cuda", "sample", "cpu", "steps", "cuda", "sample", "cpu"]


def test_with_text_encoders_all_stays(tmp_path):
    family = load_family(tiny.saved("flux"), torch.float32, CPU)
    assert not job._rested(config(tmp_path, "flux", adapter__text_encoders=True), family, GPU).parts
    assert job._rested(config(tmp_path, "flux"), family, GPU).parts
