"""How well the embedded base draws what it is asked for, without any downloaded network.

Content: of all drawings of all subjects, the one with the nearest HOG features (histograms of oriented gradients, Dalal
and Triggs 2005) is of the right subject. Style: the drawing with the nearest colours is of the right style; HOG alone
mixes styles up that are made of the same drawings. For pairs that were kept out of training, "right" is not that very
drawing: linear discriminant analysis of colour and edge statistics tells the style. It is fitted to drawings that went
through the VAE, so that the VAE's own look tells nothing; how many of those it tells right is printed, too.

Run: python benchmarks/base_scores.py --data base-data.npz [--base FOLDER] [--count N] [--guidance G]
    [--report FILE]
--count: how many of the trained pairs to draw, evenly spread; all of them without it. On 2 CPU cores 0.23 s a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_scripts"))

from base.measures import hog, statistics, through_vae
from base.pictures import Pictures, prompt_of

from vislora.models import EMBEDDED, load_family
from vislora.models.base import Family, place_of
from vislora.models.schedulers import scheduler_for

ROOT = Path(__file__).resolve().parents[1]

ALONE = 5


@dataclass(frozen=True)
class Discriminant:
    """Linear discriminant analysis: class means, seen through the inverse of the common covariance."""

    means: Tensor
    inverse: Tensor

    @staticmethod
    def fitted(features: Tensor, classes: Tensor) -> Discriminant:
        """Fit to `features` (n, d) of `classes` (n,), 0 and up."""
        x = features.double()
        means = torch.stack([x[classes == number].mean(0) for number in range(int(classes.max()) + 1)])
        apart = x - means[classes]
        covariance = apart.T @ apart / len(x)
        return Discriminant(means, torch.linalg.inv(covariance + 1e-6 * covariance.diagonal().mean() * _eye(x)))

    def nearest(self, features: Tensor) -> Tensor:
        """Return the class of each of `features`, by Mahalanobis distance."""
        apart = features.double()[:, None] - self.means
        return torch.einsum("ncd,de,nce->nc", apart, self.inverse, apart).argmin(1)


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


def load(base: Path) -> Family:
    """Return the base with the sampler that vislora gives it, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = load_family(base, torch.float32, device)
    family.pipeline.scheduler = scheduler_for(family.pipeline, "auto")
    return family


@torch.no_grad()
def draw(family: Family, prompts: list[str], batch: int, guidance: float | None = None) -> tuple[Tensor, float]:
    """Draw each prompt from noise of its own; return uint8 pictures and the seconds that one took."""
    pipe, traits = family.pipeline, family.traits
    denoiser: Any = family.components["denoiser"]
    side = denoiser.config.sample_size
    noise = [torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))]
    scale = traits.guidance_scale if guidance is None else guidance
    found, began = [], time.perf_counter()
    for start in range(0, len(prompts), batch):
        some = slice(start, start + batch)
        latents = torch.stack(noise[some]).to(pipe.device)
        how = {"num_inference_steps": traits.steps, "guidance_scale": scale, "output_type": "pt", **traits.always}
        found.append((pipe(prompts[some], latents=latents, **how).images * 255.0).round().to(torch.uint8).cpu())
        print(f"drawn {min(start + batch, len(prompts))} of {len(prompts)}", flush=True)
    return torch.cat(found), (time.perf_counter() - began) / len(prompts)


def scores(
    pictures: Pictures, seen_by_vae: Tensor, trained: list[int], unseen: list[int], drawn: Tensor
) -> dict[str, Any]:
    """Return the shares that are right. `drawn`: the pictures of `trained` and then of `unseen`."""
    kept = (~pictures.held_out).nonzero().flatten().tolist()
    asked = [*trained, *unseen]
    by_hog = (hog(drawn) @ hog(pictures.pixels).T).argmax(1).tolist()
    by_colour = torch.cdist(colours(drawn), colours(pictures.pixels)).argmin(1).tolist()
    words = sorted(set(pictures.styles))
    classes = torch.tensor([words.index(style) for style in pictures.styles])
    told = Discriminant.fitted(statistics(seen_by_vae[kept]), classes[kept])
    by_statistics = told.nearest(statistics(drawn)) == classes[asked]
    real = told.nearest(statistics(seen_by_vae)) == classes
    right = _same(pictures.subjects, by_hog, asked)
    style, lines = _same(pictures.styles, by_colour, asked), _same(pictures.styles, by_hog, asked)
    seen, new = slice(0, len(trained)), slice(len(trained), None)
    return {
        "trained: subject is the nearest": _share(right[seen]),
        "trained: style is the nearest, by colour": _share(style[seen]),
        "trained: style is the nearest, by HOG alone": _share(lines[seen]),
        "trained: style by statistics": _share(by_statistics[seen]),
        "unseen pairs: subject is the nearest": _share(right[new]),
        "unseen pairs: style is the nearest, by colour": _share(style[new]),
        "unseen pairs: style by statistics": _share(by_statistics[new]),
        "real drawings: style by statistics": _share(real[kept]),
        "real drawings that were held out: style by statistics": _share(real[pictures.held_out]),
        "unseen pairs, style by statistics": {
            word: _share(by_statistics[new][[pictures.styles[index] == word for index in unseen]]) for word in words
        },
    }


def colours(pixels: Tensor) -> Tensor:
    """Return the colours (n, 3 * height / 2 * width / 2), 0 to 1, of uint8 pictures (n, 3, height, width)."""
    return F.avg_pool2d(pixels.float() / 255.0, 2).flatten(1)


def _same(names: list[str], found: list[int], asked: list[int]) -> Tensor:
    return torch.tensor([names[one] == names[two] for one, two in zip(found, asked, strict=True)])


def _share(right: Tensor) -> float:
    return round(float(right.double().mean()), 4) if len(right) else float("nan")


def main() -> None:
    """Draw, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("base-data.npz"))
    parser.add_argument("--base", type=place_of, default=EMBEDDED)
    parser.add_argument("--count", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--guidance", type=float, help="guidance scale; the base's own without it")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    pictures = Pictures.read(given.data)
    known = (~pictures.held_out).nonzero().flatten()
    count = min(given.count or len(known), len(known))
    trained = known[torch.linspace(0, len(known) - 1, count).long()].tolist()
    unseen = pictures.held_out.nonzero().flatten().tolist()
    prompts = [prompt_of(pictures.subjects[index], pictures.styles[index]) for index in [*trained, *unseen]]
    family = load(given.base)
    drawn, seconds = draw(family, prompts, given.batch_size, given.guidance)
    alone = sorted(draw(family, prompts[:1], 1)[1] for _ in range(ALONE))[ALONE // 2]
    found = scores(pictures, through_vae(family.pipeline.vae, pictures.pixels), trained, unseen, drawn)
    found |= {"pictures": len(prompts), "subjects": len({pictures.subjects[index] for index in trained})}
    found |= {f"seconds a picture, {given.batch_size} at once": round(seconds, 4)}
    found |= {"seconds for one alone, median": round(alone, 4)}
    print(json.dumps(found, indent=2))
    if given.report:
        given.report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
