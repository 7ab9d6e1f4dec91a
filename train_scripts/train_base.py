"""Train the embedded base from nothing but the pictures of make_base_data.py, on a GPU or on CPU cores.

    python train_scripts/make_base_data.py --out base-data.npz
    python train_scripts/train_base.py --data base-data.npz --out runs/base --minutes 5

First the vocabulary, then the VAE, then its decoder alone, then denoiser and text encoder together. What is finished is
kept in OUT, so the same command goes on where it was stopped. `OUT/base` is the diffusers folder; it is written every
minute.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from base.denoiser import Both, Examples, Training, train_denoiser
from base.parts import (
    make_text_encoder,
    make_unet,
    make_vae,
    pipeline,
    read_tokenizer,
    train_tokenizer,
    write_base,
)
from base.pictures import Pictures, prompt_of
from base.progress import Budget, draw_curve
from base.vae import encode, finish_decoder, train_vae
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from vislora.files import replacing

SHOWN = ("fox", "owl", "sunflower", "red apple", "crown", "guitar", "automobile", "robot", "angry face", "crab")


@dataclass(frozen=True)
class Place:
    """The files of a run."""

    folder: Path

    @property
    def log(self) -> Path:
        """Return the log of both trainings."""
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


@dataclass(frozen=True)
class Minutes:
    """How long each part is trained."""

    vae: float
    decoder: float
    denoiser: float


def make_tokenizer(place: Place, pictures: Pictures) -> None:
    """Train the vocabulary on all captions, those of held-out pairs included: their words are known ones."""
    if not (place.tokenizer / "merges.txt").exists():
        train_tokenizer([text for row in pictures.captions() for text in row], place.tokenizer)


def settled_vae(place: Place, pictures: Pictures, accelerator: Accelerator, minutes: float) -> AutoencoderKL:
    """Return the trained VAE, trained now when it is not there yet."""
    vae = make_vae().to(accelerator.device)
    if place.vae.exists():
        vae.load_state_dict(load_file(place.vae))
        return vae.eval()
    on_gpu = accelerator.device.type == "cuda"
    budget = Budget(minutes, place.log, "vae")
    train_vae(vae, pictures.pixels.to(accelerator.device), budget, accelerator, 512 if on_gpu else 32)
    keep(vae, place.vae)
    return vae


def keep(vae: AutoencoderKL, path: Path) -> None:
    """Write the weights of `vae` aside, then put them in place."""
    with replacing(path) as temporary:
        save_file({key: value.contiguous().cpu() for key, value in vae.state_dict().items()}, temporary)


def export(place: Place, vae: AutoencoderKL, styles: list[str], both: Both) -> None:
    """Write the base as it is now, and a grid of what it draws."""
    pipe = pipeline(vae, both.unet, both.text, read_tokenizer(place.tokenizer))
    write_base(pipe, place.tokenizer, place.folder / "base")
    grid(pipe, styles).save(place.folder / "grid.png")
    for what in ("vae", "decoder", "denoiser"):
        draw_curve(place.log, what, "loss", place.folder / f"{what}.png")


@torch.no_grad()
def grid(pipe: StableDiffusionPipeline, styles: list[str]) -> Image.Image:
    """Return a sheet of subjects (across) and styles (down)."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt_of(subject, style) for style in styles for subject in SHOWN]
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator).images
    side = images[0].width
    sheet = Image.new("RGB", (side * len(SHOWN), side * len(styles)))
    for number, image in enumerate(images):
        sheet.paste(image, (number % len(SHOWN) * side, number // len(SHOWN) * side))
    return sheet


def run(data: Path, place: Place, minutes: Minutes, batch: int | None) -> None:
    """Train all parts."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    torch.set_float32_matmul_precision("high")
    set_seed(0)
    pictures = Pictures.read(data)
    make_tokenizer(place, pictures)
    trained, tokenizer = pictures.trained(), read_tokenizer(place.tokenizer)
    vae = settled_vae(place, trained, accelerator, minutes.vae)
    pixels = trained.pixels.to(accelerator.device)
    moments = encode(vae, pixels)
    if not place.decoder.exists():
        finish_decoder(vae, moments, pixels, Budget(minutes.decoder, place.log, "decoder"), accelerator)
        keep(vae, place.decoder)
    vae.load_state_dict(load_file(place.decoder))
    examples = Examples(moments, trained.tokens(tokenizer).to(accelerator.device), vae.config.scaling_factor)
    training = Training(Both(make_unet(), make_text_encoder(tokenizer)), accelerator, place.folder / "state.pt")
    budget = Budget(minutes.denoiser, place.log, "denoiser", *training.resume())
    count = batch or (512 if accelerator.device.type == "cuda" else 32)
    print(f"{len(moments)} pictures, {count} at once, on {accelerator.device}", flush=True)
    train_denoiser(training, examples, budget, count, partial(export, place, vae, sorted(set(trained.styles))))
    print(f"{budget.step} steps, {budget.images} images seen in this run: {place.folder / 'base'}", flush=True)


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("base-data.npz"), help="the file of make_base_data.py")
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="folder of the run")
    parser.add_argument("--minutes", type=float, default=120.0, help="time for denoiser and text encoder")
    parser.add_argument("--vae-minutes", type=float, default=10.0, help="time for the VAE")
    parser.add_argument("--decoder-minutes", type=float, default=20.0, help="more time for its decoder")
    parser.add_argument("--batch-size", type=int, help="images in a step; by default 512 on a GPU, 32 on a CPU")
    chosen = parser.parse_args()
    if not chosen.data.exists():
        print(f"{chosen.data} is not there: make it with train_scripts/make_base_data.py", file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    minutes = Minutes(chosen.vae_minutes, chosen.decoder_minutes, chosen.minutes)
    run(chosen.data, Place(chosen.out), minutes, chosen.batch_size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
