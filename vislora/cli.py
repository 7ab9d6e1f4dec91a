"""The command line: one subcommand per job. A job is imported after its arguments are parsed."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vislora import __version__
from vislora.errors import ConfigError, VisloraError, nearest

INTERRUPTED = 130
BROKEN_PIPE = 141
NOISY = r"(torch|diffusers|transformers|accelerate|huggingface_hub)(\.|$)"


@dataclass(frozen=True)
class Job:
    """A subcommand. `config` and `run` are "module:attribute"; `run(config)` is a generator of records."""

    about: str
    config: str
    run: str


JOBS = {
    "train": Job(
        "train a style or character adapter from a folder of images",
        "vislora.config.train:TrainConfig",
        "vislora.jobs.train:run",
    ),
    "generate": Job(
        "make images with any number of stacked adapters",
        "vislora.config.generate:GenerateConfig",
        "vislora.jobs.generate:run",
    ),
    "convert": Job(
        "write an adapter in another file format, checked exactly",
        "vislora.config.convert:ConvertConfig",
        "vislora.jobs.convert:run",
    ),
    "merge": Job(
        "make one adapter of several, with its error against their sum",
        "vislora.config.merge:MergeConfig",
        "vislora.jobs.merge:run",
    ),
    "resize": Job(
        "make an adapter smaller, with the error of every module",
        "vislora.config.resize:ResizeConfig",
        "vislora.jobs.resize:run",
    ),
    "extract": Job(
        "make an adapter of a fine-tuned model minus its base",
        "vislora.config.extract:ExtractConfig",
        "vislora.jobs.extract:run",
    ),
    "library": Job(
        "list the adapters in folders: family, rank, trigger words",
        "vislora.config.library:LibraryConfig",
        "vislora.jobs.library:run",
    ),
    "inspect": Job(
        "say what is in an adapter file",
        "vislora.config.inspect:InspectConfig",
        "vislora.jobs.inspect:run",
    ),
}

EXAMPLES = """
examples:
  vislora train --folder photos --output runs/mine
  vislora train --config train.toml --rank 16
  vislora generate --prompt "a cat" --adapter runs/mine/mine.safetensors:0.8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for an error that the user can mend."""
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except VisloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout is gone; without this the interpreter complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vislora {__version__}")
        return 0
    name = arguments[0]
    if name not in JOBS:
        raise ConfigError(f"unknown job '{name}'{nearest(name, JOBS)}; jobs: {', '.join(JOBS)}")
    return _run(name, arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    # pydantic would look through every installed package for plugins of its own; the settings use none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # The imports wait until here: help must be quick, and a wrong flag must not cost the import of torch.
    from vislora.config import flags

    job = JOBS[name]
    config = flags.parse(_attribute(job.config), arguments, prog=f"vislora {name}")
    _silence_known_noise()
    from vislora import console

    return console.show(_attribute(job.run)(config))


def _attribute(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def _silence_known_noise() -> None:
    """Hide what libraries tell their own developers; a warning about what the user asked for is not among it."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=NOISY)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # diffusers imports bitsandbytes, which on some CPUs wants a kernel from the hub that nothing here needs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _help() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {job.about}" for name, job in JOBS.items())
    return (
        "usage: vislora JOB [options]\n\n"
        "LoRA adapters for Stable Diffusion and vision models.\n\n"
        f"jobs:\n{jobs}\n\n"
        "  vislora JOB --help   all options of a job\n"
        "  vislora --version\n"
        f"{EXAMPLES}"
    )
