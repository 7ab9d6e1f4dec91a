"""A declared stack: the same `[[stack]]` for `generate` and for a pipeline in Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislora.config import toml
from vislora.config.stack import ComposeConfig, ComposedStackConfig
from vislora.errors import ConfigError
from vislora.inject.strength import Strength
from vislora.jobs.pipelines import eject, load, loaded_strengths, set_composition, set_strengths
from vislora.jobs.prompts import label_adapters
from vislora.jobs.strengths import declared


@dataclass(frozen=True)
class Stack:
    """Adapters and their strengths.

    strengths: name of an adapter -> its strength. paths: name -> its file or folder. Two files of one name have folders
    in front of it. compose: how they act together.
    """

    strengths: Mapping[str, Strength]
    paths: Mapping[str, Path]
    compose: ComposeConfig = field(default_factory=ComposeConfig)

    @staticmethod
    def read(path: str | Path) -> Stack:
        """Read a TOML file of `[[stack]]` tables. Raises `ConfigError` with every problem."""
        return Stack.of_config(toml.load(path, ComposedStackConfig))

    @staticmethod
    def of(
        tables: Sequence[Mapping[str, Any]],
        adapters: Iterable[str | Path] = (),
        compose: Mapping[str, Any] | None = None,
    ) -> Stack:
        """Return the stack of these tables, with the keys of `[[stack]]`.

        adapters: folders to find names in. compose: with the keys of `[compose]`.
        Raises `ConfigError` with every problem.
        """
        folders = {"adapters": tuple(Path(folder) for folder in adapters)} if adapters else {}
        return Stack.of_config(ComposedStackConfig.of({"stack": list(tables), "compose": compose or {}, **folders}))

    @staticmethod
    def of_config(config: ComposedStackConfig) -> Stack:
        """Return the stack of checked settings. Raises `ConfigError`."""
        if config.compose.by_prompt:
            raise ConfigError(
                "compose.by_prompt needs a prompt, which a stack has none of: set_composition(pipeline, method, "
                "shares=vislora.prompt_shares(pipeline, prompt, words)) for each"
            )
        given = [(table.adapter, declared(table)) for table in config.stack]
        labels, paths = label_once([name for name, _ in given], config.adapters)
        return Stack({labels[name]: strength for name, strength in given}, paths, config.compose)

    def apply(self, pipeline: Any, *, allow_partial: bool = False, allow_pickle: bool = False) -> None:
        """Make this the stack of `pipeline`: load what is missing, set the strengths, all other adapters to 0.

        What is loaded under a name of this stack is taken to be that adapter. Applying a stack of the same adapters
        again is only a change of strengths. Raises what `load` and `set_strengths` do; then the pipeline is as it was.
        """
        before = loaded_strengths(pipeline)
        missing = [name for name in self.paths if name not in before]
        done = []
        try:
            for name in missing:
                load(pipeline, self.paths[name], 0.0, name, allow_partial=allow_partial, allow_pickle=allow_pickle)
                done.append(name)
            set_strengths(pipeline, {**dict.fromkeys(before, 0.0), **self.strengths})
            if self.paths:
                set_composition(pipeline, self.compose.method, **self.compose.settings)
        except BaseException:
            for name in done:
                eject(pipeline, name)
            set_strengths(pipeline, before)
            raise


def label_once(names: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, str], dict[str, Path]]:
    """Return what `label_adapters` does. Raises `ConfigError` for an adapter given twice, by whatever names."""
    labels, paths = label_adapters(names, folders)
    twice = [label for label, times in Counter(labels[name] for name in names).items() if times > 1]
    if twice:
        raise ConfigError(f"adapter: {', '.join(twice)} is given more than once; give it once, with one strength")
    return labels, paths
