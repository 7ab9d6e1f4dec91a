"""Writing that never leaves half a file: a temporary neighbour, fsync, then rename."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from vislora.errors import VisloraError

_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`, else delete it.

    Works for a file and for a folder (an existing folder is swapped out, then deleted).
    Raises `VisloraError` when the disk is full or the place cannot be written to; `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        _swap(temporary, path)
    except OSError as error:
        _remove(temporary, made)
        raise _explained(error, path) from error
    except BaseException as error:
        _remove(temporary, made)
        code = _os_error_in(error)
        if code is None:
            raise
        raise _explained(OSError(code, os.strerror(code)), path) from error


@contextmanager
def reserving(candidates: Iterable[Path], taken: Callable[[Path], bool] = Path.exists) -> Iterator[Path]:
    """Yield the first of `candidates` that is not `taken`, held against every other process that asks for it so.

    What is to be there must be there when the block ends. Raises `VisloraError` when the place cannot be written to.
    """
    for path in candidates:
        mark = path.with_name(f".{path.name}.taken")
        if not _created(mark):
            continue
        try:
            if not taken(path):
                yield path
                return
        finally:
            mark.unlink(missing_ok=True)
    raise ValueError("none of the candidates is free")


@contextmanager
def syncing(path: Path) -> Iterator[None]:
    """Write a file or folder to the disk while the body runs, so that nobody waits for the disk alone."""
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(_sync, path)
        yield
        written.result()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder by name."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    text = "\n".join(f"{file.relative_to(path)} {sha256(file)}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _created(mark: Path) -> bool:
    """Create an empty file; say whether it was not there. Only one of several processes at once gets a yes."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except OSError as error:
        if isinstance(error, FileExistsError) and mark.parent.is_dir():
            return False
        raise _explained(error, mark.parent) from error
    os.close(descriptor)
    return True


def _sync(path: Path) -> None:
    files = [item for item in path.rglob("*") if item.is_file()] if path.is_dir() else [path]
    for file in files:
        file.chmod(0o666 & ~_UMASK)  # writers that use a private temporary file leave it readable by its owner alone
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    os.rename(path, old)
    os.rename(temporary, path)
    _remove(old)


def _remove(path: Path, made: Iterable[Path] = ()) -> None:
    """Remove `path`, and those folders of `made` that are empty then."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def _os_error_in(error: BaseException) -> int | None:
    """safetensors wraps what the system said: `I/O error: No space left on device (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)$", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def _explained(error: OSError, path: Path) -> VisloraError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VisloraError(f"no space left on the disk to write {path}; free some and run the same command again")
    return VisloraError(f"cannot write {path}: {error.strerror or error}")
