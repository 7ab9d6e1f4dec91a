"""Train the embedded base from nothing but the pictures of make_base_data.py, on a GPU or on CPU cores.

    python train_scripts/make_base_data.py --out base-data.npz
    python train_scripts/train_base.py --data base-data.npz --out runs/base

First the vocabulary, then the VAE, then its decoder alone, then denoiser and text encoder together. The state of each
training is written every few minutes, so the same command goes on where it was stopped. `OUT/base` is the diffusers
folder; it is written while the last part trains.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from base.denoiser import RATE, Examples, Training, train_denoiser
from base.layout import Layout, start_from
from base.parts import make_vae, read_tokenizer, train_tokenizer, write_base
from base.pictures import Pictures, prompt_of
from base.progress import Budget, draw_curve
from base.sd import StableDiffusion1
from base.sd3 import StableDiffusion3
from base.vae import encode, encode_moved, finish_decoder, train_vae
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vislora.files import replacing
from vislora.models.base import place_of
from vislora.models.schedulers import scheduler_for

SHOWN = ("fox", "owl", "sunflower", "red apple", "crown", "guitar", "automobile", "robot", "angry face", "crab")


@dataclass(frozen=True)
class Place:
    """The files of a run."""

    folder: Path

    @property
    def log(self) -> Path:
        """Return the log of all trainings."""
        return self.folder / "log.jsonl"

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the vocabulary."""
        return self.folder / "tokenizer"

    @property
    def vae(self) -> Path:
        """Return the file of the VAE whose latents are settled."""
        return self.folder / "vae.safetensors"

    @property
    def decoder(self) -> Path:
        """Return the file of the VAE with the finished decoder."""
        return self.folder / "vae-finished.safetensors"

    def state(self, what: str) -> Path:
        """Return the file of the state of the training of `what`."""
        return self.folder / f"{what}-state.pt"


@dataclass(frozen=True)
class Counts:
    """A number for each part that is trained."""

    vae: int
    decoder: int
    denoiser: int


LAYOUTS: dict[str, Layout] = {"sd": StableDiffusion1(), "sd3": StableDiffusion3()}
BATCHES = {"cuda": Counts(512, 128, 512), "cpu": Counts(32, 16, 64)}


def make_tokenizer(place: Place, pictures: Pictures, start: Path | None) -> None:
    """Take the vocabulary of `start`, or train it on all captions, held-out pairs' too: their words are known ones."""
    if (place.tokenizer / "merges.txt").exists():
        return
    if start:
        place.tokenizer.mkdir(exist_ok=True)
        for name in ("vocab.json", "merges.txt"):  # the last one says that both are there
            shutil.copy(start / "tokenizer" / name, place.tokenizer)
    else:
        train_tokenizer(pictures.texts(), place.tokenizer)


def settled_vae(
    place: Place, pictures: Pictures, accelerator: Accelerator, budget: Budget, batch: int, start: Path | None
) -> AutoencoderKL:
    """Return the trained VAE, trained now, from that of the base in `start` if given, when it is not there yet."""
    vae = make_vae().to(accelerator.device)
    if place.vae.exists():
        vae.load_state_dict(load_file(place.vae))
        return vae.eval()
    if start:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start / "vae").state_dict())
    train_vae(vae, pictures.pixels.to(accelerator.device), budget, accelerator, batch, place.state("vae"))
    keep(vae, place.vae, place.state("vae"))
    return vae


def keep(vae: AutoencoderKL, path: Path, state: Path) -> None:
    """Write the weights of `vae` aside, then put them in place of the state of its training."""
    with replacing(path) as temporary:
        save_file({key: value.contiguous().cpu() for key, value in vae.state_dict().items()}, temporary)
    state.unlink(missing_ok=True)


def export(place: Place, layout: Layout, vae: AutoencoderKL, styles: list[str], model: nn.Module) -> None:
    """Write the base as it is now, and a grid of what it draws."""
    with torch.random.fork_rng():  # what is drawn here, when the time has come, changes no step
        pipe = layout.pipeline(vae, model, read_tokenizer(place.tokenizer, layout.length))
        write_base(pipe, place.tokenizer, place.folder / "base", layout.defaults)
        grid(pipe, layout, styles).save(place.folder / "grid.png")
    for what in ("vae", "decoder", "denoiser"):
        draw_curve(place.log, what, "loss", place.folder / f"{what}.png")


@torch.no_grad()
def grid(pipe: DiffusionPipeline, layout: Layout, styles: list[str]) -> Image.Image:
    """Return a sheet of subjects (across) and styles (down)."""
    pipe.scheduler = scheduler_for(pipe, "auto")
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt_of(subject, style) for style in styles for subject in SHOWN]
    generator = torch.Generator().manual_seed(0)
    steps, scale = int(layout.defaults["steps"]), layout.defaults["guidance_scale"]
    images = pipe(prompts, num_inference_steps=steps, guidance_scale=scale, generator=generator, **layout.always).images
    side = images[0].width
    sheet = Image.new("RGB", (side * len(SHOWN), side * len(styles)))
    for number, image in enumerate(images):
        sheet.paste(image, (number % len(SHOWN) * side, number // len(SHOWN) * side))
    return sheet


def run(place: Place, images: Counts, chosen: argparse.Namespace) -> None:
    """Train all parts."""
    accelerator = Accelerator(mixed_precision=chosen.precision)
    torch.set_float32_matmul_precision("high")
    at_once = BATCHES.get(accelerator.device.type, BATCHES["cpu"])
    pictures = Pictures.read(chosen.data)
    make_tokenizer(place, pictures, chosen.start)
    layout = LAYOUTS[chosen.layout]
    trained, tokenizer = pictures.trained(), read_tokenizer(place.tokenizer, layout.length)
    budget = Budget(images.vae // at_once.vae, place.log, "vae")
    set_seed(0)  # once for each part: a run that stopped between two of them goes on as one that did not
    vae = settled_vae(place, trained, accelerator, budget, at_once.vae, chosen.start or chosen.vae_from)
    pixels = trained.pixels.to(accelerator.device)
    set_seed(0)
    moments = encode(vae, pixels)
    if not place.decoder.exists():
        budget = Budget(images.decoder // at_once.decoder, place.log, "decoder")
        finish_decoder(vae, moments, pixels, budget, accelerator, at_once.decoder, place.state("decoder"))
        keep(vae, place.decoder, place.state("decoder"))
    vae.load_state_dict(load_file(place.decoder))
    several = len(layout.shifts) > 1
    moments = encode_moved(vae, pixels, layout.shifts, accelerator) if several else moments[None]
    examples = Examples(moments, layout.shifts, trained, tokenizer, vae.config.scaling_factor, layout.texts)
    set_seed(0)
    model = layout.model(tokenizer)
    if chosen.start:
        start_from(chosen.start, layout.parts(model))
    training = Training(layout, model, accelerator, place.state("denoiser"), chosen.rate)
    budget = Budget(images.denoiser // at_once.denoiser, place.log, "denoiser")
    training.resume(budget)
    print(f"{moments.shape[1]} pictures, {at_once.denoiser} at once, on {accelerator.device}", flush=True)
    if accelerator.device.type == "cuda" if chosen.compile is None else chosen.compile:
        reason = training.compile(examples, at_once.denoiser)
        print(f"not compiled: {reason}" if reason else "compiled; its gradients are those of the model", flush=True)
    shown = partial(export, place, layout, vae, sorted(set(trained.styles)))
    train_denoiser(training, examples, budget, at_once.denoiser, shown)
    print(f"{budget.step} steps, {budget.images} images seen in this run: {place.folder / 'base'}", flush=True)


def base_folder(text: str) -> Path:
    """Return the folder of a base, by path or an embedded one's name. Raises `ArgumentTypeError` for what is none."""
    folder = place_of(text)
    if not (folder / "model_index.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no folder of a base: it has no model_index.json")
    return folder


def own_precision() -> str:
    """Return bf16 where the processor has it; on one that has not (AVX2) products of matrices take 70 times as long."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 cannot tell
    has_it = torch.cuda.is_available() or any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bf16" if has_it else "no"


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("base-data.npz"), help="the file of make_base_data.py")
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="folder of the run")
    parser.add_argument("--layout", choices=LAYOUTS, default="sd", help="Stable Diffusion 1's UNet or 3's transformer")
    parser.add_argument("--images", type=int, default=540_000, help="how many denoiser and text encoder see")
    parser.add_argument("--vae-images", type=int, default=160_000, help="how many crops the VAE sees")
    parser.add_argument("--decoder-images", type=int, default=80_000, help="how many more its decoder sees, whole")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--vae-from", type=base_folder, help="folder of a base whose VAE is trained on, not a fresh one")
    begin.add_argument(
        "--start", type=base_folder, help="folder of a base of this layout: all its parts are trained on"
    )
    parser.add_argument("--rate", type=float, default=RATE, help="highest learning rate of denoiser and text encoder")
    parser.add_argument(
        "--precision",
        choices=("bf16", "no"),
        default=own_precision(),
        help="bf16, or no: float32. Default: bf16 on a GPU, and on a CPU that has instructions for it",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the denoiser, which takes minutes at the start (two CPU cores then train the UNet in 0.72 of the "
        "time, the DiT in 0.6), unless its gradients are then other ones. Default: on a GPU alone",
    )
    chosen = parser.parse_args()
    denoiser = LAYOUTS[chosen.layout].denoiser
    if chosen.start and not (chosen.start / denoiser).is_dir():
        parser.error(f"{chosen.start} has no {denoiser}: name its layout with --layout")
    if not chosen.data.exists():
        print(f"{chosen.data} is not there: make it with train_scripts/make_base_data.py", file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    run(Place(chosen.out), Counts(chosen.vae_images, chosen.decoder_images, chosen.images), chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
