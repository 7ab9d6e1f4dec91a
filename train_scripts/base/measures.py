"""What a drawing shows and how it looks, in numbers, without any downloaded network.

Content: histograms of oriented gradients (Dalal and Triggs 2005). Look: statistics of colour and edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from base.pictures import as_input
from vislora.data.scan import scan

WHITE = 0.96
CELL, BINS = 8, 9


def hog(pixels: Tensor) -> Tensor:
    """Return HOG features (n, features), of length 1, of uint8 pictures (n, 3, height, width)."""
    grey = (pixels.float() / 255.0).mean(1, keepdim=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    across, down = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2], padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    size, angle = torch.hypot(across, down), torch.atan2(down, across) % torch.pi
    place = angle / torch.pi * BINS - 0.5
    low, share = place.floor(), place - place.floor()
    votes = torch.zeros(len(grey), BINS, *grey.shape[2:], device=grey.device)
    votes.scatter_add_(1, (low % BINS).long(), size * (1.0 - share))
    votes.scatter_add_(1, ((low + 1) % BINS).long(), size * share)
    cells = F.avg_pool2d(votes, CELL)
    blocks = F.unfold(cells, 2)
    return F.normalize(F.normalize(blocks, dim=1, eps=1e-2).clamp(max=0.2).flatten(1), dim=1)


def statistics(pixels: Tensor) -> Tensor:
    """Return statistics (n, 110) of uint8 pictures (n, 3, height, width): of look, palette and edges."""
    x = pixels.float() / 255.0
    drawn = (x.amin(1) < WHITE).float()
    return torch.cat([look(x, drawn), palette(x, drawn), edges(x)], 1)


def look(x: Tensor, drawn: Tensor) -> Tensor:
    """Return means and spreads of colour and edges over what is `drawn` (n, height, width), its inside and border."""
    high, low, grey = x.amax(1), x.amin(1), x.mean(1)
    saturation, steps = (high - low) / high.clamp(min=1e-3), _steps(x)
    inside = drawn * -F.max_pool2d(-drawn[:, None], 7, 1, 3)[:, 0]
    border = F.max_pool2d(1.0 - drawn[:, None], 3, 1, 1)[:, 0] * drawn

    def mean(values: Tensor, where: Tensor = drawn) -> Tensor:
        return (values * where).mean((1, 2)) / where.mean((1, 2)).clamp(min=1e-3)

    found = [drawn.mean((1, 2)), mean(saturation), mean(high), mean(grey), mean(steps), mean(steps, inside)]
    found += [mean((values - mean(values)[:, None, None]).square()).sqrt() for values in (saturation, grey, steps)]
    found += [mean((steps > level).float()) for level in (0.02, 0.1, 0.3)]
    found += [mean((steps < 0.004).float(), inside), mean((grey < 0.25).float()), mean((grey > 0.85).float())]
    found += [mean((saturation < 0.15).float()), mean((saturation > 0.8).float())]
    found += [mean(grey, border), mean(saturation, border), *(mean(channel) for channel in x.unbind(1))]
    return torch.stack(found, 1)


def palette(x: Tensor, drawn: Tensor, levels: int = 4) -> Tensor:
    """Return the square roots of the shares of `levels`^3 colours in what is `drawn`."""
    red, green, blue = (x * (levels - 1e-4)).long().clamp(0, levels - 1).unbind(1)
    colour = (red * levels + green) * levels + blue
    counts = torch.zeros(len(x), levels**3, device=x.device).scatter_add_(1, colour.flatten(1), drawn.flatten(1))
    return (counts / counts.sum(1, keepdim=True).clamp(min=1.0)).sqrt()


def edges(x: Tensor) -> Tensor:
    """Return the square roots of the shares of edges by strength, at three sizes of the picture."""
    levels = torch.tensor([0.004, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32], device=x.device)
    found = []
    for size in (1, 2, 4):
        level = torch.bucketize(_steps(F.avg_pool2d(x, size)).flatten(1), levels)
        found.append(F.one_hot(level, len(levels) + 1).float().mean(1).sqrt())
    return torch.cat(found, 1)


def _steps(x: Tensor) -> Tensor:
    """Return the largest step of colour from the left and the upper neighbour to each pixel."""
    return torch.stack([(x - x.roll(1, axis)).abs().amax(1) for axis in (2, 3)]).amax(0)


def looks(pixels: Tensor) -> Tensor:
    """Return the statistics of the look (n, 26)."""
    x = pixels.float() / 255.0
    return look(x, (x.amin(1) < WHITE).float())


@torch.no_grad()
def through_vae(vae: Any, pixels: Tensor) -> Tensor:
    """Return what the VAE makes of uint8 pictures (n, 3, height, width): its own look then tells nothing."""
    made = [vae(as_input(part).to(vae.device)).sample for part in pixels.split(64)]
    return ((torch.cat(made).cpu() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def style_gain(goal: Tensor, real: Tensor, base: Tensor, adapted: Tensor) -> float:
    """Return the style gain. All are statistics (n, 26): of the folder, of the artist's other drawings, of pictures."""
    spread = torch.cat([goal, base]).std(0).clamp(min=1e-3)

    def distance(found: Tensor) -> float:
        return float(((found.mean(0) - goal.mean(0)) / spread).norm())

    nearest = distance(real)
    return 1.0 - (distance(adapted) - nearest) / (distance(base) - nearest)


def content(drawings: Sequence[tuple[Tensor, list[str]]], drawn: Tensor, subjects: Sequence[str]) -> float:
    """Return how often the nearest of all `drawings` (pixels, subjects), by HOG, is of the right subject."""
    pixels = torch.cat([part for part, _ in drawings])
    names = [name for _, part in drawings for name in part]
    nearest = (hog(drawn) @ hog(pixels).T).argmax(1).tolist()
    return sum(names[index] == subject for index, subject in zip(nearest, subjects, strict=True)) / len(subjects)


def content_apart(looks: Sequence[tuple[Tensor, list[str]]], drawn: Tensor, subjects: Sequence[str]) -> float:
    """Return how often the nearest of all drawings is of the right subject, by HOG without the mean of each look.

    looks: (pixels, subjects) of each. A look's mean is that of the `subjects` in it; the mean of `drawn` is taken from
    `drawn`. It judges where the look hides the content: what all faces of a character have in common says nothing.
    """
    features, names = [], []
    for pixels, of in looks:
        found = hog(pixels)
        features.append(F.normalize(found - found[[name in subjects for name in of]].mean(0), dim=1))
        names += of
    asked = hog(drawn)
    nearest = ((asked - asked.mean(0)) @ torch.cat(features).T).argmax(1).tolist()
    return sum(names[index] == subject for index, subject in zip(nearest, subjects, strict=True)) / len(subjects)


def subject_of(caption: str, form: str) -> str:
    """Return the subject in a caption such as `a fox, ink style`; `form` is `{subject}, ink style`."""
    before, after = form.split("{subject}")
    return caption.split(" ", 1)[1].removeprefix(before).removesuffix(after)


@dataclass(frozen=True)
class Drawings:
    """What somebody drew: uint8 pixels (n, 3, side, side), and the captions."""

    pixels: Tensor
    captions: list[str]

    @staticmethod
    def read(folder: Path, side: int) -> Drawings:
        """Read a folder of captioned pictures."""
        examples = scan(folder).examples
        pixels = [as_pixels(Image.open(example.path), side) for example in examples]
        return Drawings(torch.stack(pixels), [example.caption for example in examples])


def as_pixels(image: Image.Image, side: int) -> Tensor:
    """Return an image as uint8 (3, side, side)."""
    small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)
