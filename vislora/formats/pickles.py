"""Read a pickle's tensors without opening the pickle here: a process of its own writes them down. Torch-free."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from vislora.errors import AdapterFileError

PROGRAM = Path(__file__).with_name("unpickle.py")
# cloneofsimo writes an adapter as up to three files: NAME.pt, NAME.text_encoder.pt, NAME.ti.pt
SIBLINGS = {"text_encoder": "text_encoder", "ti": "embeddings"}
# what a Python interpreter may need to start; the process gets nothing else of the environment
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP")
BYTES_PER_SECOND = 10_000_000
SHORTEST_WAIT = 60


class TensorCopy:
    """A temporary .safetensors file at `path`. It is deleted when nothing refers to this any more, or at exit."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="vislora-")
        self.path = Path(folder) / "tensors.safetensors"
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


def unpickled(path: Path) -> TensorCopy:
    """Return a copy of the tensors in the pickle at `path`.

    Raises `AdapterFileError` when it is damaged, names what no file of tensors needs, or takes too long.
    """
    copy = TensorCopy()
    command = [sys.executable, "-I", "-S", str(PROGRAM), str(path), str(copy.path), _role(path)]
    wait = SHORTEST_WAIT + os.path.getsize(path) // BYTES_PER_SECOND
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=wait, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise AdapterFileError(f"{path}: its pickle was not read within {wait} seconds") from None
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip() or f"its reader ended with code {done.returncode}"
        raise AdapterFileError(f"{path}: its pickle cannot be read: {said}")
    return copy


def siblings(path: Path) -> list[Path]:
    """Return the other files of an adapter whose first file is `path`: `a.pt` -> `a.text_encoder.pt`, `a.ti.pt`."""
    if _role(path) != "unet":
        return []
    places = (path.with_name(f"{path.stem}.{middle}{path.suffix}") for middle in SIBLINGS)
    return [place for place in places if place.is_file()]


def _role(path: Path) -> str:
    return SIBLINGS.get(Path(path.stem).suffix.removeprefix("."), "unet")
