"""Time and peak memory of a conversion, against reading and writing the same bytes, and against diffusers.

Every measurement is a process of its own, and the cases take turns. A file counts as written when it is on the disk
(fsync). vislora's time includes the proof: the file is loaded back and every module compared. Bars: 1.5 times the time
of safetensors, and memory for 1.2 times the file.

Run: python benchmarks/convert.py [--rounds N] [--megabytes N] [--listing FILE] [--report FILE]
--listing: {"keys": {key: shape}} of a kohya file; without it, one for SD 1.5 is made. Ranks are raised to the size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

Shapes = Mapping[str, tuple[int, ...]]
PEER = "safetensors: read, write"
METADATA = {"ss_network_module": "networks.lora", "sshs_model_hash": "", "sshs_legacy_hash": ""}


def with_safetensors(source: Path, destination: Path) -> Callable[[], None]:
    """Read and write the same bytes."""
    from safetensors.torch import load_file, save_file

    def run() -> None:
        save_file(load_file(source), destination, METADATA)
        sync(destination)

    return run


def with_diffusers(source: Path, destination: Path) -> Callable[[], None]:
    """Convert as diffusers does when it loads the file, and save that; nothing is compared."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors.torch import save_file

    more = {"unet_config": SimpleNamespace(layers_per_block=2)} if b"lora_te2_" in source.read_bytes()[:999_999] else {}
    pipeline = StableDiffusionXLPipeline if more else StableDiffusionPipeline

    def run() -> None:
        tensors, *_ = pipeline.lora_state_dict(str(source), **more)
        save_file(tensors, destination)
        sync(destination)

    return run


def with_vislora(to: str) -> Callable[[Path, Path], Callable[[], None]]:
    """Convert with the proof."""

    def prepared(source: Path, destination: Path) -> Callable[[], None]:
        from vislora.jobs.convert import convert

        def run() -> None:
            report = convert(source, destination, to)
            if not report.ok:
                raise SystemExit(report.verdict)

        return run

    return prepared


CASES = {
    PEER: with_safetensors,
    "diffusers: lora_state_dict, write": with_diffusers,
    "vislora: kohya to diffusers": with_vislora("diffusers"),
    "vislora: kohya to kohya, with its hashes": with_vislora("kohya"),
    "vislora: kohya to a PEFT folder": with_vislora("peft"),
}


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(case: str, source: Path, folder: Path) -> dict[str, float]:
    """Run one case in this process. Returns wall and CPU seconds, and the growth of resident memory in bytes."""
    name = "out" if "PEFT" in case else "out.safetensors"
    run = CASES[case](source, folder / name)
    memory, before, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    run()
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "memory": resident("VmHWM") - memory}


def resident(field: str) -> float:
    """Return the memory of this process in bytes, now (VmRSS) or at most (VmHWM); ru_maxrss counts its parent's too."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * int(lines[field].split()[0])


def in_own_process(case: str, source: Path) -> dict[str, float]:
    """Measure in a fresh process, when everything that others wrote is on the disk."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, __file__, "--measure", case, str(source), folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def sd15_shapes(rank: int = 8) -> Shapes:
    """Return the keys and shapes of a kohya LoRA on every linear layer and conv of SD 1.5's UNet."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            name, (out, *rest) = "lora_unet_" + path.replace(".", "_"), layer.weight.shape
            shapes[f"{name}.lora_down.weight"] = (rank, *rest)
            shapes[f"{name}.lora_up.weight"] = (out, rank, *[1] * (len(rest) - 1))
            shapes[f"{name}.alpha"] = ()
    return shapes


def make_source(shapes: Shapes, size: int, path: Path) -> int:
    """Write a half-precision file of about `size` bytes: random numbers, ranks times the same. Returns its size."""
    import torch
    from safetensors.torch import save_file

    times = max(1, round(size / (2 * sum(math.prod(shape) for shape in shapes.values()))))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        axis = 0 if ".lora_down." in key else 1
        grown = [side * times if place == axis else side for place, side in enumerate(shape)]
        tensor = torch.randn(grown, generator=generator) * 0.02 if shape else torch.tensor(4.0)
        tensors[key] = tensor.half()
    save_file(tensors, path, METADATA)
    return path.stat().st_size


def spread(values: list[float], digits: int) -> str:
    """Return `median (min-max)`."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f}-{ordered[-1]:.{digits}f})"


def table(found: Mapping[str, list[dict[str, float]]], size: int) -> str:
    """Return the results as a table: medians, with minimum and maximum; ratios are of the pairs of one round."""
    lines = ["| case | wall s | times safetensors | CPU s | memory, times the file |", "|---|---|---|---|---|"]
    for case, runs in found.items():
        ratios = [mine["seconds"] / peer["seconds"] for mine, peer in zip(runs, found[PEER], strict=True)]
        row = [spread([item["seconds"] for item in runs], 2), spread(ratios, 2)]
        row += [spread([item["cpu"] for item in runs], 2), spread([item["memory"] / size for item in runs], 2)]
        lines.append(f"| {case} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all cases in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--listing", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        case, source, folder = given.measure
        print(json.dumps(measure(case, Path(source), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        shapes = json.loads(given.listing.read_text())["keys"] if given.listing else sd15_shapes()
        size = make_source(shapes, given.megabytes * 1_000_000, source)
        found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(given.rounds):
            for case in CASES:
                found[case].append(in_own_process(case, source))
    modules = sum(key.endswith(".alpha") for key in shapes)
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, no GPU used"
    what = f"{modules} modules, {size / 1e6:.0f} MB, fp16; {given.rounds} rounds, median (min-max); {machine}"
    text = f"{what}; {datetime.now(UTC):%Y-%m-%d}\n\n{table(found, size)}\n"
    print(text)
    if given.report:
        given.report.write_text(f"# Conversion\n\n{text}")


if __name__ == "__main__":
    main()
