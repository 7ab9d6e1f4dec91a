"""Do one thing to many, in processes of their own: one that fails, or is killed, does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def each(
    function: Callable[[T], R], tasks: Sequence[T], workers: int | None, killed: Callable[[T], R]
) -> Iterator[tuple[T, R]]:
    """Yield every task with its result, as they come.

    workers: how many processes; None means one per core. A single one is this process. killed: the result of a task
    whose process ended without one. `function` and its results go through pickle. A script that calls this begins its
    work under `if __name__ == "__main__"`, for every process imports it anew.
    """
    count = min(workers or cores(), len(tasks))
    if count <= 1:
        yield from ((task, function(task)) for task in tasks)
        return
    waiting = dict(enumerate(tasks))
    for place, result in _pooled(function, waiting, count):
        yield waiting.pop(place), result
    # a killed process takes the whole pool with it: what is left runs alone, so that only the guilty one is lost
    for place, task in waiting.items():
        alone = dict(_pooled(function, {place: task}, 1))
        yield task, alone[place] if alone else killed(task)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_worker() -> bool:
    """Say whether this process is one of several that work side by side, each of which has one core to itself."""
    return multiprocessing.parent_process() is not None


def _pooled(function: Callable[[T], R], tasks: dict[int, T], count: int) -> Iterator[tuple[int, R]]:
    """Yield results until all are there or the pool breaks. Processes are spawned: torch does not survive a fork."""
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        places = {pool.submit(function, task): place for place, task in tasks.items()}
        for future in as_completed(places):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield places[future], future.result()
