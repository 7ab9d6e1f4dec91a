"""One training step and one denoising step of released models at full size, beside the estimate of their memory.

    python benchmarks/families_gpu.py [--only "SDXL"] [--device cuda]

Weights are random: time and memory do not depend on them. bf16, rank 16 on attention-ff, AdamW, one image of the
model's own size, text encoders and VAE left out. Needs what the tests need.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from memory import CASES, RANK, Case, denoiser, measured
from torch import nn

from tests import tiny
from vislora.inject.injection import eject
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.jobs.memory import GIB
from vislora.models.base import Family, load_family
from vislora.training.loss import DenoisingLoss, LossOptions

REPEATS = 5


def loaded(case: Case, device: torch.device) -> Family:
    """Return a family whose denoiser has its full size and random weights."""
    family: Any = load_family(tiny.saved(case.family), torch.bfloat16, torch.device("cpu"))
    model = denoiser(case.config, torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter.requires_grad_(False), std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    setattr(family.pipeline, family.card.attributes["denoiser"], model)
    family.components = {"denoiser": model}
    made: Family = family
    return made


def inputs(case: Case, device: torch.device) -> dict[str, Any]:
    """Return latents and text features of one image."""
    text: dict[str, Any] = {name: torch.randn(1, *shape, device=device) for name, shape in case.text.items()}
    text = {name: rows.abs().ceil().long().clamp_max(1) if name == "mask" else rows for name, rows in text.items()}
    text = {name: rows if rows.dtype == torch.long else rows.bfloat16() for name, rows in text.items()}
    text = {name: list(rows) if case.ragged else rows for name, rows in text.items()}
    return {"latents": torch.randn(1, *case.latents, device=device), "text": text}


def timed(compute: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the median seconds of `compute` and the most memory that was allocated, in GiB (0 without a GPU)."""
    compute()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        compute()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[REPEATS // 2], torch.cuda.max_memory_allocated() / GIB if gpu else 0.0


def rows(case: Case, device: torch.device) -> Iterator[str]:
    """Yield table rows: a denoising step, and training steps with and without checkpointing."""
    family, batch = loaded(case, device), inputs(case, device)
    model: Any = family.components["denoiser"]
    t = torch.full((1,), 500, device=device)
    given = {**batch["text"]}

    def denoise() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            family.predict(batch["latents"], t, given)

    seconds, peak = timed(denoise, device)
    yield f"| {case.title} | denoising step | {seconds:.3f} | {peak:.2f} | |"
    for checkpointing in (True, False):
        model.train(checkpointing)
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        chosen = select(model, [], "attention-ff", Target("", RANK))
        adapters = inject_fresh(model, "benchmark", chosen, FreshOptions()).to(device)
        loss = DenoisingLoss(family, {"denoiser": adapters}, LossOptions())
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4)

        def step(loss: DenoisingLoss = loss, optimizer: torch.optim.AdamW = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(batch, torch.Generator().manual_seed(0))
            value.backward()
            optimizer.step()

        seconds, peak = timed(step, device)
        eject(model, "benchmark")
        estimate = measured(case, torch.bfloat16, checkpointing)
        told = (estimate.weights["denoiser"] + estimate.step) / GIB
        name = "training step, checkpointing" if checkpointing else "training step"
        yield f"| {case.title} | {name} | {seconds:.3f} | {peak:.2f} | {told:.2f} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="titles that contain this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "")
    asked = parser.parse_args()
    if not asked.device:
        print("there is no GPU; --device cpu takes hours")
        return
    device = torch.device(asked.device)
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", torch.__version__)
    print("| base | step | seconds | GiB at most | estimate |\n|---|---|---|---|---|")
    for case in CASES:
        if asked.only in case.title:
            for row in rows(case, device):
                print(row, flush=True)


if __name__ == "__main__":
    main()
