"""Time per denoising step with many adapters on a CUDA machine, against PEFT; recompilations; stacks per image.

SDXL's UNet and FLUX.1's transformer, whole, in bfloat16, with random weights made on the device. The JSON is written
after each section; PEFT comes last and is left out when most of --budget seconds is spent. Needs torch, diffusers,
transformers, accelerate and peft, no network.

Run: python -m benchmarks.runtime_gpu [--output FILE] [--budget SECONDS] [--tiny]
--tiny: few layers and small inputs, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from vislora.inject.engines import merge, unmerge
from vislora.inject.injection import eject, inject_modules, release_room, reserve_room
from vislora.inject.stack import settle, stack_of

RANK = 16
COUNTS = (1, 4, 16)
TINY_UNET: dict[str, Any] = {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1}
TINY_FLUX: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
}


@dataclass
class Bench:
    """Where and how long things are measured, and what was found."""

    device: str
    tiny: bool
    output: Path | None
    budget: float
    begun: float = field(default_factory=time.perf_counter)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of models and adapters."""
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.begun

    def keep(self, name: str, value: Any) -> None:
        """Keep a result, print it, and write the file anew."""
        self.results[name] = value
        self.results["seconds"] = round(self.elapsed, 1)
        print(f"{self.elapsed:6.1f} s  {name}: {json.dumps(value)}", flush=True)
        if self.output is not None:
            self.output.write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, work: Callable[[], Any], repeats: int = 5, warm: int = 2) -> dict[str, float]:
        """Return the milliseconds of `work`: least, median, most."""
        for _ in range(warm):
            work()
        found = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            found.append(1e3 * (time.perf_counter() - start))
        found.sort()
        return {name: round(value, 2) for name, value in zip(("min", "median", "max"), _spread(found), strict=True)}


def _spread(found: list[float]) -> tuple[float, float, float]:
    return found[0], statistics.median(found), found[-1]


def models(bench: Bench) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any, int], dict[str, Any]]]]:
    """Yield (name, builder, inputs for a batch) of the two shapes: 1024 pixels; SDXL with guidance in one pass."""
    if bench.tiny:
        yield "sdxl", lambda: shapes.sdxl_unet(shrink=8, **TINY_UNET), lambda m, n: shapes.sdxl_inputs(m, n, 8)
        yield "flux", lambda: shapes.flux_transformer(**TINY_FLUX), lambda m, n: shapes.flux_inputs(m, n, 4, 8)
        return
    where = (bench.device, bench.dtype)
    yield "sdxl", lambda: shapes.sdxl_unet(*where), lambda m, n: shapes.sdxl_inputs(m, n, 128)
    yield "flux", lambda: shapes.flux_transformer(*where), lambda m, n: shapes.flux_inputs(m, n, 64)


def set_strengths(model: Any, strengths: dict[str, Any]) -> None:
    """Set strengths as `vislora.set_strengths` does, of a bare model."""
    for name, strength in strengths.items():
        stack_of(model).set_strength(name, strength)
    settle(model)


def steps(bench: Bench, name: str, model: Any, inputs: dict[str, Any]) -> None:
    """Time a step of the base, and of 1, 4 and 16 adapters stacked and merged; and what a switch costs."""

    def step() -> None:
        model(**inputs)

    found: dict[str, Any] = {"base": bench.time(step)}
    for number in range(max(COUNTS)):
        inject_modules(model, f"a{number:02}", shapes.random_adapter(model, RANK, number), 0.0)
    for count in COUNTS:
        set_strengths(model, {f"a{number:02}": 0.5 * float(number < count) for number in range(max(COUNTS))})
        found[f"{count} stacked"] = bench.time(step)
        merge(model)
        found[f"{count} merged"] = bench.time(step, repeats=3)
        unmerge(model)
    bench.keep(f"{name}: step, ms", found)
    bench.keep(f"{name}: switch two adapters, ms", switches(bench, model))
    for number in range(max(COUNTS)):
        eject(model, f"a{number:02}")
    bench.keep(f"{name}: step after ejecting all, ms", bench.time(step))


def switches(bench: Bench, model: Any) -> dict[str, Any]:
    """Time the change from one pair of adapters to another, with 16 loaded: the numbers, and what is made of them."""
    set_strengths(model, {f"a{number:02}": 0.0 for number in range(max(COUNTS))})
    pairs = [("a00", "a01"), ("a02", "a03")]
    turn = [0]

    def change() -> None:
        turn[0] += 1
        old, new = pairs[turn[0] % 2], pairs[(turn[0] + 1) % 2]
        set_strengths(model, {**dict.fromkeys(old, 0.0), **dict.fromkeys(new, 0.7)})

    def stacked() -> None:
        change()
        for layer, state in _states(model):
            state.prepare(layer)

    def merged() -> None:
        change()
        merge(model)

    found = {"stacked": bench.time(stacked, 3, 1), "merged": bench.time(merged, 3, 1)}
    unmerge(model)
    return found


def _states(model: Any) -> Iterator[tuple[Any, Any]]:
    from vislora.inject.layer import state_of

    for layer in stack_of(model).index.layers.values():
        state = state_of(layer)
        if state is not None and state.on:
            yield layer, state


def per_image(bench: Bench, name: str, model: Any, make: Callable[[Any, int], dict[str, Any]]) -> None:
    """Time one forward of a batch of 8, each image with an adapter of its own, against 8 forwards of one."""
    count = 8
    batch, single = make(model, count), make(model, 1)
    found: dict[str, Any] = {"base, batch of 8": bench.time(lambda: model(**batch), 3, 1)}
    for number in range(count):
        inject_modules(model, f"a{number:02}", shapes.random_adapter(model, RANK, number), 0.0)
    own = {f"a{n:02}": [0.7 if image == n else 0.0 for image in range(count)] for n in range(count)}
    set_strengths(model, own)
    found["a stack for each of 8"] = bench.time(lambda: model(**batch), 3, 1)
    set_strengths(model, {**dict.fromkeys(own, 0.0), "a00": 0.7})
    merge(model)
    found["one image, its adapter merged before"] = bench.time(lambda: model(**single), 3, 1)
    unmerge(model)
    found["one image, its adapter stacked"] = bench.time(lambda: model(**single), 3, 1)
    together, alone = found["a stack for each of 8"]["median"], found["one image, its adapter merged before"]["median"]
    found["ratio to 8 single runs merged before"] = round(together / (count * alone), 3)
    for number in range(count):
        eject(model, f"a{number:02}")
    bench.keep(f"{name}: stacks per image, ms", found)


def with_peft(bench: Bench, name: str, model: Any, inputs: dict[str, Any]) -> None:
    """Time the same with PEFT, through the methods of diffusers' models."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = [module.path for module in shapes.random_adapter(model, 1, 0)]
    found: dict[str, Any] = {}
    added = 0
    for count in COUNTS:
        start = time.perf_counter()
        while added < count:
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
            model.add_adapter(config, f"a{added:02}")
            added += 1
        names = [f"a{number:02}" for number in range(count)]
        found[f"adding up to {count}, s"] = round(time.perf_counter() - start, 2)
        model.set_adapters(names, [0.5] * count)
        model.requires_grad_(False)
        found[f"{count} stacked"] = bench.time(lambda: model(**inputs), 3, 1)
        if bench.elapsed > 0.8 * bench.budget:
            break
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def fuse() -> None:
        for tuner in tuners:
            tuner.merge(adapter_names=["a00"])
        for tuner in tuners:
            tuner.unmerge()

    found["fuse and unfuse one"] = bench.time(fuse, 3, 1)
    bench.keep(f"{name}: PEFT, ms", found)


def compiled(bench: Bench) -> None:
    """Count what switching compiles, on a FLUX of a few blocks; time its step with and without room for adapters."""
    from torch._dynamo.utils import counters

    changes: dict[str, Any] = TINY_FLUX if bench.tiny else {"num_layers": 1, "num_single_layers": 2}
    model = shapes.flux_transformer(bench.device, bench.dtype, **changes)
    inputs = shapes.flux_inputs(model, 1, 4 if bench.tiny else 64, 8 if bench.tiny else 512)
    found: dict[str, Any] = {"eager base": bench.time(lambda: model(**inputs))}
    torch._dynamo.reset()
    counters.clear()
    wrapped: Any = torch.compile(model, backend="eager" if bench.tiny else "inductor")
    start = time.perf_counter()
    wrapped(**inputs)
    found["compiling the base, s"] = round(time.perf_counter() - start, 1)
    found["compiled base"] = bench.time(lambda: wrapped(**inputs))
    reserve_room(wrapped, 64, "attention-ff")
    start = time.perf_counter()
    wrapped(**inputs)
    found["compiling with room for rank 64, s"] = round(time.perf_counter() - start, 1)
    before = counters["stats"]["unique_graphs"]
    found["compiled, room empty"] = bench.time(lambda: wrapped(**inputs))
    for number, rank in enumerate((16, 32, 8)):
        inject_modules(wrapped, f"a{number}", shapes.random_adapter(model, rank, number), 0.6)
        wrapped(**inputs)
    found["compiled, 3 adapters of rank 56 together"] = bench.time(lambda: wrapped(**inputs))

    def switch() -> None:
        set_strengths(wrapped, {"a0": 0.3, "a1": 0.0, "a2": -1.0})
        set_strengths(wrapped, {"a0": 0.6, "a1": 0.5, "a2": 0.1})

    found["two switches"] = bench.time(switch, 3, 1)
    eject(wrapped, "a1")
    wrapped(**inputs)
    found["graphs compiled by all these changes"] = counters["stats"]["unique_graphs"] - before
    release_room(wrapped)
    bench.keep("flux of 3 blocks, torch.compile, ms", found)


@torch.no_grad()
def run(bench: Bench) -> None:
    """Run the sections until the budget is spent."""
    device = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    bench.keep("what", {"device": device, "torch": torch.__version__, "dtype": str(bench.dtype), "rank": RANK})
    for name, build, make in models(bench):
        model = build()
        bench.keep(f"{name}: built", {"parameters": sum(p.numel() for p in model.parameters())})
        steps(bench, name, model, make(model, 2 if name == "sdxl" else 1))
        if name == "sdxl":
            per_image(bench, name, model, make)
        del model
        clear(bench, name)
    compiled(bench)
    clear(bench, "compiled")
    if bench.elapsed < 0.75 * bench.budget:
        name, build, make = next(models(bench))
        model = build()
        with_peft(bench, name, model, make(model, 2))
    else:
        bench.keep("PEFT, ms", "not run: the budget was spent")


def clear(bench: Bench, name: str) -> None:
    """Give the memory of a section back, and keep how much it was."""
    gc.collect()
    if bench.device == "cuda":
        bench.keep(f"{name}: peak memory, GB", round(torch.cuda.max_memory_allocated() / 1e9, 1))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--budget", type=float, default=115.0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not given.tiny else "cpu"
    run(Bench(device, given.tiny, given.output, given.budget))


if __name__ == "__main__":
    main()
