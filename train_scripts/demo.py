"""The demonstration behind `make demo`: train a style, stack it with a second one, convert it - offline, on a CPU."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from base.measures import Drawings, as_pixels, content, looks, style_gain, subject_of, through_vae
from PIL import Image

import vislora
from vislora import console
from vislora.config.toml import load as load_toml
from vislora.config.train import TrainConfig
from vislora.errors import VisloraError
from vislora.jobs.inspect import as_text
from vislora.jobs.train import run as run_train
from vislora.models.base import load_family
from vislora.reports.page import Part, polyline, write_page
from vislora.reports.sheet import contact_sheet

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo")
LEFT_OUT = ROOT / "samples" / "left-out" / "ink"
SIDE = 64
SUBJECTS = (
    "a fox",
    "an owl",
    "a rabbit face",
    "a sunflower",
    "a crown",
    "a guitar",
    "an automobile",
    "a soccer ball",
)
STYLE, SECOND = "ink", "outline"
ROWS = {
    "base": {},
    STYLE: {STYLE: 1.0},
    SECOND: {SECOND: 1.0},
    f"{STYLE} + {SECOND}": {STYLE: 0.6, SECOND: 0.6},
}
FORMATS = {"kohya": "ink-kohya.safetensors", "diffusers": "ink-diffusers.safetensors", "peft": "ink-peft"}


def main() -> int:
    """Run the three jobs and leave `demo/index.html` and `demo/sheet.png`."""
    began = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    adapter = train()
    sheet, rows = generate(adapter)
    found = scores(rows)
    table = convert(adapter)
    minutes = (time.perf_counter() - began) / 60
    page(adapter, sheet, found, table, minutes)
    print(f"done in {minutes:.1f} minutes: look at {OUT / 'index.html'} and {OUT / 'sheet.png'}")
    return 0


def train() -> Path:
    """Train the style on the sample folder, as `vislora train --config samples/ink.toml --output demo/ink` does."""
    print(f"1/3 train: {STYLE}, from the pictures in samples/{STYLE}", flush=True)
    config = load_toml(ROOT / "samples" / f"{STYLE}.toml", TrainConfig)
    changes = {
        "output": OUT / STYLE,
        "data": config.data.model_copy(update={"folder": ROOT / "samples" / STYLE}),
    }
    console.show(run_train(config.model_copy(update=changes)))
    return OUT / STYLE / f"{STYLE}.safetensors"


def generate(adapter: Path) -> tuple[Image.Image, dict[str, list[Image.Image]]]:
    """Make every subject with the base, each style, and both: a sheet, and the rows by name.

    None of the subjects is in a training folder.
    """
    print("2/3 generate: base, each style, both stacked", flush=True)
    second = ROOT / "samples" / "adapters" / SECOND
    rows: list[list[Image.Image]] = []
    for strengths in ROWS.values():
        style = SECOND if list(strengths) == [SECOND] else STYLE
        paths = {STYLE: adapter, SECOND: second}
        pictures = vislora.generate(
            prompt=tuple(f"{subject}, {style} style" for subject in SUBJECTS),
            adapter=tuple(f"{paths[name]}:{strength}" for name, strength in strengths.items()),
            batch_size=len(SUBJECTS),
            output=OUT / "images" / ("-".join(strengths) or "base"),
        )
        rows.append([picture.image for picture in pictures])
    sheet = contact_sheet(rows, list(ROWS), SUBJECTS, cell=128)
    sheet.save(OUT / "sheet.png")
    return sheet, dict(zip(ROWS, rows, strict=True))


def scores(rows: dict[str, list[Image.Image]]) -> list[tuple[str, ...]]:
    """Judge the new style by what its artist drew of the same subjects, which no folder holds; rows of a table."""
    folder, kept = Drawings.read(ROOT / "samples" / STYLE, SIDE), Drawings.read(LEFT_OUT, SIDE)
    form = f"{{subject}}, {STYLE} style"
    subjects = [subject.split(" ", 1)[1] for subject in SUBJECTS]
    names = [subject_of(caption, form) for caption in kept.captions]
    real = kept.pixels[[names.index(subject) for subject in subjects]]
    drawings = [(folder.pixels, [subject_of(caption, form) for caption in folder.captions]), (kept.pixels, names)]
    base, adapted = (torch.stack([as_pixels(image, SIDE) for image in rows[name]]) for name in ("base", STYLE))
    vae = load_family(None, torch.float32, torch.device("cpu")).pipeline.vae
    goal, own = (looks(through_vae(vae, pixels)) for pixels in (folder.pixels, real))
    gain = style_gain(goal, own, looks(base), looks(adapted))
    told = content(drawings, adapted, subjects)
    print(f"    style gain {gain:.2f}, subject recognised {told:.2f}", flush=True)
    return [
        ("score", "", "what it is"),
        (
            "style gain",
            f"{gain:.2f}",
            "0: the base's look; 1: as near to the folder's look as the artist's other drawings",
        ),
        (
            "content",
            f"{told:.2f}",
            f"how often the nearest of {len(names) + len(folder.captions)} ink drawings is right",
        ),
    ]


def convert(adapter: Path) -> list[tuple[str, ...]]:
    """Write the adapter in every format; return what each conversion proved, as rows of a table."""
    print("3/3 convert: kohya, diffusers, PEFT", flush=True)
    rows: list[tuple[str, ...]] = [("format", "file", "verdict")]
    for name, file in FORMATS.items():
        report = vislora.convert(adapter, OUT / file, name)
        print(f"    {name}: {report.verdict}", flush=True)
        rows.append((name, file, report.verdict))
    return rows


def training_pictures() -> Image.Image:
    """Lay eight pictures of the folder out with their captions."""
    files = sorted((ROOT / "samples" / STYLE).glob("*.png"))[::5][: len(SUBJECTS)]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in files]
    return contact_sheet([[Image.open(path) for path in files]], [f"samples/{STYLE}"], captions, cell=128)


def page(
    adapter: Path, sheet: Image.Image, found: list[tuple[str, ...]], table: list[tuple[str, ...]], minutes: float
) -> None:
    """Write the page."""
    losses = [json.loads(line)["loss"] for line in (OUT / STYLE / "log.jsonl").read_text().splitlines()]
    parts = [
        Part("Learned from 40 pictures such as these", image=training_pictures()),
        Part("Base, two styles, and both at once", "None of these subjects was in a training folder.", sheet),
        Part("How well", "By statistics of colour and edges, and by gradients; no network judges.", table=found),
        Part("Training loss", f"Mean over 20 steps, {len(losses)} steps.", curve=polyline(losses)),
        Part("One adapter, three formats", "Each file was loaded back and compared, module by module.", table=table),
        Part("What is in the file", code=as_text(vislora.inspect(adapter), metadata=False)),
        Part("The same by hand", code=COMMANDS),
    ]
    lead = f"Trained, generated and converted on this machine in {minutes:.1f} minutes, without a download."
    write_page(OUT / "index.html", "vislora: a style learned from a folder", lead, parts)


COMMANDS = """vislora train --config samples/ink.toml --output runs/ink
vislora generate --prompt "a fox, ink style" --sheet \\
    --adapter runs/ink/ink.safetensors:0.6 --adapter samples/adapters/outline:0.6
vislora convert runs/ink/ink.safetensors ink-diffusers.safetensors --to diffusers
vislora inspect runs/ink/ink.safetensors"""

if __name__ == "__main__":
    try:
        sys.exit(main())
    except VisloraError as error:
        sys.exit(f"error: {error}")
