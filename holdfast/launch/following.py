"""Looking at a run again and again until it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_view import RunReader, RunView

__all__ = ["PATIENCE_S", "views"]

PATIENCE_S = 60.0
"""For the next attempt, when a driver is gone that has not said how its run ended."""


def views(
    run: RunDir,
    *,
    every_s: float,
    newest_steps: int | None = None,
    patience_s: float = PATIENCE_S,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[RunView]:
    """The run now and every ``every_s`` seconds, across attempts.

    The last one is of a run that is over, or that nobody has driven for ``patience_s`` seconds.
    """
    reader = RunReader(run, newest_steps=newest_steps)
    driven_s = now()
    while True:
        view = reader.view()
        driven_s = driven_s if view.driver is None else now()
        yield view
        if view.is_over or now() - driven_s >= patience_s:
            return
        sleep(every_s)
