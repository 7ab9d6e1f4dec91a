"""Many adapters on one base against diffusers and PEFT: CPU time, side by side and taking turns.

Loading and unloading: an SDXL file of 986 modules in float16, as its models (UNet and both text encoders, whole trees,
widths cut to a quarter: the cost is per module). Steps, switches, mixed batches: LoRAs of rank 16 on the attention of
a UNet of half width, latents of 32 x 32. One thread. A bar is the largest ratio of medians over pairs that is aimed at.

Run: python -m benchmarks.runtime [--model sd15|sdxl] [--rounds N] [--only NAME] [--report FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from vislora import formats
from vislora.formats import AdapterFile, AdapterModule
from vislora.formats.names import canonical
from vislora.inject.engines import merge, unmerge
from vislora.inject.injection import eject, inject_modules
from vislora.inject.stack import settle, stack_of
from vislora.inject.strength import per_image
from vislora.inject.targets import Target, select
from vislora.jobs.pipelines import by_component

RANK = 16
Work = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One bar: the medians in milliseconds, and the ratios pair by pair (least, median, most)."""

    name: str
    bar: float
    mine: float
    other: float
    least: float
    ratio: float
    most: float

    @property
    def line(self) -> str:
        """Return the row of the table."""
        verdict = "ok" if self.ratio <= self.bar else "MISSED"
        spread = f"{self.least:.3f}-{self.ratio:.3f}-{self.most:.3f}"
        return f"{self.name:<52} {self.mine:>9.1f} {self.other:>9.1f}  {spread:<21} {self.bar:.3f} {verdict}"


def compared(name: str, bar: float, rounds: int, mine: Work, other: Work, between: Work = lambda: None) -> Result:
    """Time both in turns, once each as a warm-up; `between` runs after each, untimed."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for work, found in zip((mine, other), times, strict=True):
            start = time.process_time()
            work()
            found.append(1e3 * (time.process_time() - start))
            between()
    return summed_up(name, bar, [times[0][1:], times[1][1:]])


def summed_up(name: str, bar: float, times: Sequence[Sequence[float]]) -> Result:
    """Return medians and ratios of the milliseconds of both."""
    ratios = sorted(one / two for one, two in zip(*times, strict=True))
    mine, other = (statistics.median(column) for column in times)
    return Result(name, bar, mine, other, ratios[0], statistics.median(ratios), ratios[-1])


def text_encoder(layers: int, width: int, projected: bool) -> Any:
    """Return a CLIP text encoder of so many layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4, "projection_dim": width}
    ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPTextConfig(num_hidden_layers=layers, **sizes, **ids)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return shapes.filled(lambda: kind(config), "cpu", torch.float16)


def sdxl_file(components: Mapping[str, Any], path: Path) -> int:
    """Write a kohya file for every attention and feed-forward layer; return the number of its modules."""
    modules = [
        AdapterModule(
            component=component,
            path=module.path if component == "denoiser" else canonical(module.path),
            algo="lora",
            tensors=dict(module.slots),
            alpha=float(RANK),
        )
        for component, model in components.items()
        for module in shapes.random_adapter(model, RANK, 0)
    ]
    formats.save(AdapterFile(modules=modules, family="sdxl"), path, "kohya")
    return len(modules)


def loading(rounds: int) -> Iterator[Result]:
    """Bars 1 and 2."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = shapes.sdxl_unet(dtype=torch.float16, shrink=4)
    texts = text_encoder(12, 96, False), text_encoder(32, 160, True)
    components = {"denoiser": unet, "te:clip_l": texts[0], "te:clip_g": texts[1]}
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl.safetensors"
        count = sdxl_file(components, path)
        loaded: list[int] = []

        def load() -> None:
            """What `vislora.load` does, component by component: this pipeline has no tokenizers."""
            loaded.append(0)
            for component, modules in by_component(formats.load(path), components).items():
                assert inject_modules(components[component], "a", modules, component=component) == []
                loaded[-1] += len(modules)

        def unload() -> None:
            for model in components.values():
                eject(model, "a")

        def clean() -> None:
            if hasattr(unet, "peft_config"):
                pipeline.unload_lora_weights()
            else:
                unload()
            gc.collect()

        their_load = lambda: pipeline.load_lora_weights(str(path), adapter_name="a")  # noqa: E731
        yield compared(f"1 load, {count} modules / diffusers", 1 / 15, rounds, load, their_load, clean)
        assert set(loaded) == {count}
        yield unloading(rounds, load, unload, their_load, pipeline.unload_lora_weights)


def unloading(rounds: int, load: Work, unload: Work, their_load: Work, their_unload: Work) -> Result:
    """Bar 2: each loads, untimed, before it unloads."""

    def timed(before: Work, work: Work) -> float:
        before()
        start = time.process_time()
        work()
        return 1e3 * (time.process_time() - start)

    times = [(timed(load, unload), timed(their_load, their_unload)) for _ in range(rounds + 1)][1:]
    return summed_up("2 unload / diffusers", 1 / 15, list(zip(*times, strict=True)))


@dataclass
class Bases:
    """Three models of the same weights: as it is, with vislora's adapters, with PEFT's."""

    plain: Any
    mine: Any
    peft: Any
    inputs: Callable[[int], dict[str, Any]]
    targets: list[str]
    added: int = 0

    def strengths(self, given: Mapping[str, Any]) -> None:
        """Set strengths as `vislora.set_strengths` does."""
        stack_of(self.mine).set_strengths({name: per_image(name, strength) for name, strength in given.items()})
        settle(self.mine)

    def add(self, count: int) -> None:
        """Have `count` adapters on both."""
        from peft import LoraConfig

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=self.targets, init_lora_weights=False)
        for number in range(self.added, count):
            inject_modules(self.mine, f"a{number:02}", shapes.random_adapter(self.mine, RANK, number, "attention"), 0.0)
            self.peft.add_adapter(config, f"a{number:02}")
        self.added = max(count, self.added)
        self.peft.requires_grad_(False)

    def activate(self, count: int) -> None:
        """Have the first `count` of them active, with the same strengths on both."""
        names = [f"a{number:02}" for number in range(count)]
        rest = {f"a{number:02}": 0.0 for number in range(count, self.added)}
        self.strengths({**rest, **dict.fromkeys(names, 0.5)})
        self.peft.set_adapters(names, [0.5] * count)


def bases(kind: str) -> Bases:
    """Build the models."""
    if kind == "sdxl":
        build: Any = lambda: shapes.sdxl_unet(shrink=2)  # noqa: E731
        inputs: Any = shapes.sdxl_inputs
    else:
        build, inputs = shapes.sd15_unet, shapes.sd15_inputs
    plain, mine, peft = build(), build(), build()
    targets = list(select(plain, [], "attention", Target("", RANK)))
    return Bases(plain, mine, peft, lambda batch: inputs(plain, batch, 32), targets)


def stepping(rounds: int, models: Bases) -> Iterator[Result]:
    """Bars 3 to 6."""
    one = models.inputs(1)
    run = {name: lambda model=model: model(**one) for name, model in (("base", models.plain), ("mine", models.mine))}
    theirs = lambda: models.peft(**one)  # noqa: E731
    models.add(4)
    models.activate(4)
    merge(models.mine)
    yield compared("3 step, 4 adapters merged / plain base", 1.02, rounds, run["mine"], run["base"])
    unmerge(models.mine)
    yield switching(rounds, models)
    yield mixing(rounds, models)
    for count, bar in ((16, 0.85), (64, 0.70)):
        models.add(count)
        models.activate(count)
        yield compared(f"4 step, {count} adapters stacked / PEFT", bar, rounds, run["mine"], theirs)


def switching(rounds: int, models: Bases) -> Result:
    """Bar 5: from one pair of merged adapters to another."""
    pairs = [["a00", "a01"], ["a02", "a03"]]
    turns = {"mine": 0, "peft": 0}

    def mine() -> None:
        old, new = pairs[turns["mine"] % 2], pairs[(turns["mine"] + 1) % 2]
        turns["mine"] += 1
        models.strengths({**dict.fromkeys(old, 0.0), **dict.fromkeys(new, 0.7)})
        merge(models.mine)

    def theirs() -> None:
        new = pairs[(turns["peft"] + 1) % 2]
        turns["peft"] += 1
        models.peft.unfuse_lora()
        models.peft.set_adapters(new, [0.7, 0.7])
        models.peft.fuse_lora(adapter_names=new)

    models.activate(2)
    models.peft.fuse_lora(adapter_names=pairs[0])
    found = compared("5 switch two merged adapters / unfuse and fuse", 1 / 4, rounds, mine, theirs)
    models.peft.unfuse_lora()
    unmerge(models.mine)
    return found


def mixing(rounds: int, models: Bases) -> Result:
    """Bar 6: a batch of four, each image with an adapter of its own, against four calls of merged models."""
    four, one = models.inputs(4), models.inputs(1)
    models.strengths({f"a{n:02}": [0.7 if image == n else 0.0 for image in range(4)] for n in range(4)})
    calls = lambda: [models.plain(**one) for _ in range(4)]  # noqa: E731
    name = "6 batch of 4, a stack each / 4 calls merged before"
    found = compared(name, 0.80, rounds, lambda: models.mine(**four), calls)
    models.strengths({f"a{n:02}": 0.0 for n in range(4)})
    return found


def quiet() -> None:
    """Have diffusers and transformers print errors only: they list every parameter of a model while PEFT is put on."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def commit() -> str:
    """Return the commit that was measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@torch.no_grad()
def main() -> None:
    """Measure, print the table, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("load", "step"))
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet()
    torch.set_num_threads(1)
    found: list[Result] = []
    parts: list[Callable[[], Iterator[Result]]] = []
    if given.only != "step":
        parts.append(lambda: loading(given.rounds))
    if given.only != "load":
        parts.append(lambda: stepping(given.rounds, bases(given.model)))
    for part in parts:
        for result in part():
            print(result.line, flush=True)
            found.append(result)
    if given.report is not None:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "machine": f"{platform.machine()}, one thread of a shared 2-core CPU",
            "model": {"sd15": "SD 1.5, half width", "sdxl": "SDXL, half width"}[given.model],
            "versions": {"torch": torch.__version__},
            "milliseconds and ratios": [asdict(result) for result in found],
        }
        given.report.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
