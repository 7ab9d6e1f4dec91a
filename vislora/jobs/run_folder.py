"""The folder of a training run: what is in it, and whether a run may start or go on there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislora.config.data import DataConfig
from vislora.config.toml import dump
from vislora.config.train import TrainConfig
from vislora.errors import ConfigError, listed
from vislora.files import write_text
from vislora.training.checkpoints import checkpoints, load_checkpoint, step_of

# what may change between a run and its continuation: none of it touches what a step computes
FREE = ("output", "name", "format", "save_precision", "resume", "overwrite", "dry_run", "device")
FREE_SECTIONS = ("sample.",)
FREE_DATA = ("data.folder", "data.cache", "prior.regularization", "data.skip_bad", "data.allow_missing_captions")
FREE_LOOP = ("loop.steps", "loop.save_every", "loop.keep_checkpoints", "loop.validate_every", "loop.tensorboard")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path
    name: str

    @property
    def checkpoints(self) -> Path:
        """Folder of resumable states."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of images made while training."""
        return self.root / "samples"

    @property
    def priors(self) -> Path:
        """Folder of the pictures that the base drew for prior preservation."""
        return self.root / "priors"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures that the base drew for a slider to learn on."""
        return self.root / "pictures"

    @property
    def images(self) -> Path:
        """The images as training sees them, drawn by a dry run."""
        return self.root / "images.png"

    @property
    def log(self) -> Path:
        """One JSON line per step, and per measurement on the held-out images."""
        return self.root / "log.jsonl"

    @property
    def curve(self) -> Path:
        """The losses over the steps, as a picture."""
        return self.root / "loss.png"

    @property
    def config(self) -> Path:
        """The resolved settings; `--config` takes the file as it is."""
        return self.root / "config.toml"

    @property
    def tensorboard(self) -> Path:
        """Where accelerate writes TensorBoard events."""
        return self.root / "tensorboard"

    def adapter(self, format: str, step: int | None = None) -> Path:
        """Return where the adapter goes: a file, or a folder for PEFT; with `step`, as it was after that step."""
        stem = self.name if step is None else f"{self.name}-{step:06d}"
        folder = self.root if step is None else self.checkpoints
        return folder / (stem if format == "peft" else f"{stem}.safetensors")

    def adapters(self) -> dict[int, list[Path]]:
        """Return step -> the adapters, of this name and any format, as they were after it."""
        found: dict[int, list[Path]] = {}
        for path in self.checkpoints.iterdir():
            if match := re.fullmatch(rf"{re.escape(self.name)}-(\d{{6,}})(\.safetensors)?", path.name):
                found.setdefault(int(match[1]), []).append(path)
        return found


def open_folder(config: TrainConfig) -> tuple[RunFolder, dict[str, Any] | None]:
    """Return the run folder and, for a run that goes on, the state of its last checkpoint.

    Nothing is changed yet. Raises `ConfigError` when the folder lies among the images, when it holds a run (or an
    adapter of this name) and neither `resume`, `overwrite` nor `dry_run` is set, and when the run goes on and cannot.
    """
    _require_apart(config)
    folder = RunFolder(config.output, config.name or config.output.name)
    found = checkpoints(folder.checkpoints)
    used = found or folder.config.exists() or folder.adapter(config.format).exists()
    if used and not (config.resume or config.overwrite or config.dry_run):
        raise ConfigError(f"{folder.root} holds a run already: --resume goes on with it, --overwrite starts anew")
    return folder, load_checkpoint(found[-1]) if config.resume and found else None


def _require_apart(config: TrainConfig) -> None:
    """Raise `ConfigError` where the pictures that a run writes would be taken for images to train on."""
    place, data = config.output.expanduser().resolve(), config.data
    folders = {"data.folder": data.folder, "data.sources": data.sources, "data.masks": data.masks}
    for name, folder in {**folders, "prior.regularization": config.prior.regularization}.items():
        above = folder and folder.expanduser().resolve()
        within = data.recursive or name == "prior.regularization"
        if above and (place == above or (within and above in place.parents)):
            raise ConfigError(
                f"output: {config.output} lies in {name}, where its pictures count as images; choose another"
            )


def require_same(config: TrainConfig, folder: RunFolder, state: dict[str, Any]) -> None:
    """Raise `ConfigError` when a setting that a step depends on is not what it was at the checkpoint.

    One that there was not yet at the time had its default.
    """
    defaults = settings_of(TrainConfig(data=DataConfig(folder=Path())))
    _refuse(folder.checkpoints, "settings", _differences({**defaults, **state["settings"]}, settings_of(config)))


def require_same_contents(then: dict[str, str], now: dict[str, str], folder: RunFolder) -> None:
    """Raise `ConfigError` when something that the run reads (name -> hash) is not what it was at the checkpoint."""
    lines = [f"{name} was changed" for name in then if name in now and then[name] != now[name]]
    lines += [f"{name} is gone" for name in then if name not in now]
    lines += [f"{name} is new" for name in now if name not in then]
    _refuse(folder.checkpoints, "images, captions or base", lines)


def begin(config: TrainConfig, folder: RunFolder, step: int) -> None:
    """Make the folder ready for the steps after `step`, once nothing else can fail: see `settings_of` and `cut_log`.

    A run that starts anew takes the place of what was there; only encoded images and captions stay.
    """
    if config.overwrite and not config.resume:
        _clear(folder, config.format)
    cut_log(folder.log, step)
    write_text(folder.config, dump(config))


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return every setting that a step depends on, as flat dotted names."""
    flat = _flat(config.model_dump(mode="json"))
    free = {*FREE, *FREE_DATA, *FREE_LOOP}
    return {key: value for key, value in flat.items() if key not in free and not key.startswith(FREE_SECTIONS)}


def drop_adapters(folder: RunFolder, keep: int | None) -> None:
    """Delete the adapters of steps that have no checkpoint any more, but for those of step `keep`."""
    kept = {step_of(path) for path in checkpoints(folder.checkpoints)} | {keep}
    for step, paths in folder.adapters().items():
        for path in paths if step not in kept else ():
            _remove(path)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of a log that are past `step`: the steps after a checkpoint are done again."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if step and _step_of(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int:
    """A line that was cut off by a kill counts as past the end."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62


def _clear(folder: RunFolder, format: str) -> None:
    folders = (folder.checkpoints, folder.samples, folder.tensorboard)
    for path in (*folders, folder.log, folder.curve, folder.config, folder.adapter(format)):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {then.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def _refuse(path: Path, what: str, changed: list[str]) -> None:
    if changed:
        title = f"cannot go on from {path} with other {what} (put them back, or use another output):"
        raise ConfigError(listed(title, changed))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = [_flat(item, f"{name}.{key}" if name else key) for key, item in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {name: value}
