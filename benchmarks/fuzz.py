"""Load damaged adapter files of every format and kind: each gives an adapter or an `AdapterFileError`, quickly.

Anything else is a failure: another exception, numbers that are not finite, another meaning where only the order of the
tensors changed, more than 2 seconds of CPU time (20 of any), more than 1 GB. Case N of a seed is always the same file;
`--case N` shows it.

Run: python benchmarks/fuzz.py [--count 200000] [--seed 0] [--workers 2] [--case N]
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mutations import HARMLESS, Sample, mutated
from vislora import formats
from vislora.algebra.compare import compare
from vislora.algorithms.base import InitOptions, LayerSpec
from vislora.errors import AdapterFileError, VisloraError
from vislora.formats import AdapterFile, AdapterModule
from vislora.formats.contract import Format
from vislora.formats.writing import unwritable
from vislora.jobs.inspect import inspect
from vislora.jobs.parallel import each
from vislora.registry import ALGORITHMS, FORMATS

SECONDS, MEMORY = 2.0, 1 << 30
CHUNK = 500
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
LAYERS = {
    f"{BLOCK}attn1.to_k": LayerSpec("linear", (12, 8)),
    f"{BLOCK}attn1.to_out.0": LayerSpec("linear", (8, 8)),
    "mid_block.resnets.0.conv1": LayerSpec("conv", (8, 4, 3, 3)),
    "text_model.encoder.layers.1.mlp.fc1": LayerSpec("linear", (16, 8)),
}


@dataclass
class Tally:
    """What came of some cases. `failures`: number of the case -> what it did wrong."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0
    memory: int = 0

    def add(self, other: Tally) -> None:
        """Add what came of other cases."""
        self.outcomes.update(other.outcomes)
        self.failures.update(other.failures)
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)


class Failure(Exception):
    """A damaged file did something else than it may."""


def adapters() -> Iterator[tuple[str, AdapterFile]]:
    """Yield a small adapter of every registered kind, and LoRA with DoRA."""
    for kind in ALGORITHMS:
        modules = [_module(kind, path, spec) for path, spec in LAYERS.items()]
        yield kind, AdapterFile(modules=[item for item in modules if item is not None], family="sd")
    dora = [_module("lora", path, spec) for path, spec in LAYERS.items()]
    decomposed = [
        replace(item, magnitude=torch.ones(spec.weight_shape[0]), magnitude_axis="out")
        for item, spec in zip(dora, LAYERS.values(), strict=True)
        if item is not None
    ]
    yield "dora", AdapterFile(modules=decomposed, family="sd", metadata={"ss_base_model_version": "sd_v1"})


def _module(kind: str, path: str, spec: LayerSpec) -> AdapterModule | None:
    generator = torch.Generator().manual_seed(len(path))
    try:
        slots = ALGORITHMS[kind].init(spec, InitOptions(2, generator=generator))
    except (VisloraError, NotImplementedError):
        return None  # no such adapter on this kind of layer
    constants = ALGORITHMS[kind].constants
    tensors = {
        name: slot if name in constants else torch.randn(slot.shape, generator=generator).half()
        for name, slot in slots.items()
    }
    component = "te:clip_l" if path.startswith("text_model") else "denoiser"
    return AdapterModule(component=component, path=path, algo=kind, tensors=tensors, alpha=1.0 + len(path) % 3)


@cache
def samples() -> dict[str, Sample]:
    """Return every adapter in every format that can hold it."""
    forms = [FORMATS[name] for name in FORMATS if FORMATS[name].writable]
    found = {}
    for (kind, adapter), form in product(adapters(), forms):
        if adapter.modules and not unwritable(adapter, form.name):
            found[f"{kind} as {form.name}"] = _saved(adapter, form)
    return found


def _saved(adapter: AdapterFile, form: Format) -> Sample:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors" if form.container == "file" else "a")
        formats.save(adapter, path, form.name)
        files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
        base = path.parent if path.is_file() else path
        return {str(item.relative_to(base)): item.read_bytes() for item in sorted(files)}


def lay_down(sample: Sample, folder: Path) -> Path:
    """Write a sample below `folder` (new) and return what to load."""
    folder.mkdir()
    for name, data in sample.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return folder / next(iter(sample)) if len(sample) == 1 else folder


def case(number: int, seed: int) -> tuple[str, str, Sample]:
    """Return (sample's name, mutation, files) of one case."""
    dice = random.Random(f"{seed}:{number}")
    name = dice.choice(sorted(samples()))
    mutation, sample = mutated(dict(samples()[name]), dice)
    return name, mutation, sample


def outcome(path: Path, whole: AdapterFile | None) -> str:
    """Load a damaged adapter: 'loaded' or 'refused'. Raises `Failure`, or whatever comes out of it.

    `whole`: what it must still mean, None when it may mean anything.
    """
    try:
        adapter = formats.load(path)
    except AdapterFileError as error:
        if not str(error).strip():
            raise Failure("an error without a message") from error
        if whole is not None:
            raise Failure(f"refused, though only the order changed: {error}") from error
        return "refused"
    odd = [
        item.name for item in adapter.modules for tensor in _tensors(item) if not torch.isfinite(tensor.float()).all()
    ]
    if odd:
        raise Failure(f"not finite: {odd[0]}")
    if whole is not None and not compare(whole, adapter).exact:
        raise Failure("another meaning, though only the order changed")
    return "loaded"


def _tensors(module: AdapterModule) -> list[torch.Tensor]:
    more = [tensor for tensor in (module.magnitude, module.bias) if tensor is not None]
    return [tensor for tensor in (*module.tensors.values(), *more) if tensor.is_floating_point()]


@cache
def intact(name: str) -> AdapterFile:
    """Return a sample as it is before it is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        return formats.load(lay_down(samples()[name], Path(folder, "a")))


def run_case(number: int, seed: int, folder: Path, tally: Tally) -> None:
    """Run one case and add what came of it to `tally`."""
    name, mutation, sample = case(number, seed)
    whole = intact(name) if mutation in HARMLESS else None
    path = lay_down(sample, folder / str(number))
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        if number % 4 == 0:  # it goes the same way as `load`, but for its own summary
            with suppress(AdapterFileError):
                inspect(path)
        result = outcome(path, whole)
        seconds = time.process_time() - before
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
        tally.slowest, tally.memory = max(tally.slowest, seconds), max(tally.memory, grown)
        if seconds > SECONDS or grown > MEMORY:
            raise Failure(f"{seconds:.1f} s, {grown >> 20} MB")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        tally.failures[number] = (
            f"{name}, {mutation}: {type(error).__name__} in {Path(where.filename).name}, line {where.lineno}: "
            f"{str(error)[:150]}"
        )
        result = "failed"
    tally.outcomes[mutation.split(" + ")[0], result] += 1


def run_chunk(chunk: tuple[int, int, int]) -> Tally:
    """Run the cases from `chunk[0]` up to `chunk[1]` of the seed `chunk[2]` in a process of its own."""
    os.nice(5)
    signal.signal(signal.SIGALRM, _too_long)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(*chunk[:2]):
            signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
            run_case(number, chunk[2], Path(folder), tally)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return tally


def _too_long(*_: Any) -> None:
    raise Failure("it hangs")


def table(tally: Tally) -> str:
    """Return what came of every mutation, as a table."""
    lines = [f"{'mutation':<28} {'refused':>8} {'loaded':>8} {'failed':>8}"]
    for mutation in sorted({name for name, _ in tally.outcomes}):
        counts = [tally.outcomes[mutation, result] for result in ("refused", "loaded", "failed")]
        lines.append(f"{mutation:<28} {counts[0]:>8} {counts[1]:>8} {counts[2]:>8}")
    return "\n".join(lines)


def main() -> int:
    """Run the cases in parallel and print the table; the exit status is 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    whole = Tally()
    if given.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            run_case(given.case, given.seed, Path(folder), whole)
        print(case(given.case, given.seed), whole, sep="\n")
        return len(whole.failures)
    begun = time.monotonic()
    chunks = [(start, min(start + CHUNK, given.count), given.seed) for start in range(0, given.count, CHUNK)]
    for _, tally in each(run_chunk, chunks, given.workers, _killed):
        whole.add(tally)
        for number, failure in tally.failures.items():
            print(f"case {number}: {failure}", flush=True)
        print(f"{sum(whole.outcomes.values())} of {given.count}", file=sys.stderr, end="\r")
    print(table(whole))
    cases, kinds = sum(whole.outcomes.values()), len(samples())
    print(
        f"{cases} cases of {kinds} adapters, seed {given.seed}: {len(whole.failures)} failures; slowest "
        f"{whole.slowest * 1000:.0f} ms, most memory {whole.memory >> 20} MB; {time.monotonic() - begun:.0f} s"
    )
    return int(bool(whole.failures))


def _killed(chunk: tuple[int, int, int]) -> Tally:
    return Tally(failures={chunk[0]: f"the process of cases {chunk[0]} to {chunk[1]} was killed"})


if __name__ == "__main__":
    sys.exit(main())
