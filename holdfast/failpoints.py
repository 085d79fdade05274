"""Named places where a test or a chaos schedule may make the process fail.

``hit("snapshot.after_capture", step=7)`` costs one falsy check while nothing is armed. Names are
declared in ``NAMES`` so that a misspelled one is an error where it is armed, not a fault that never comes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.errors import ConfigurationError

__all__ = ["NAMES", "Hook", "arm", "armed", "check_name", "disarm", "hit"]

Hook = Callable[[str, int], None]
"""Called with the failpoint's name and the number of steps finished."""

NAMES: tuple[str, ...] = (
    "step.begin",
    "step.after_backward",
    "step.before_update",
    "step.after_update",
    "snapshot.before_capture",
    "snapshot.mid_capture",
    "snapshot.after_capture",
    "snapshot.before_commit",
    "snapshot.after_commit",
    "keeper.before_encode",
    "keeper.mid_encode",
    "keeper.before_vote",
    "keeper.after_record",
    "keeper.before_flip",
    "recovery.after_abort",
    "recovery.after_join",
    "recovery.before_restore",
    "recovery.after_restore",
    "evaluate.begin",
    "export.begin",
)

_hooks: dict[str, Hook] = {}


def check_name(name: str) -> str:
    """Return ``name`` if it is a declared failpoint; otherwise say which one was probably meant."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(NAMES)}"
        raise ConfigurationError(f"failpoint {name!r} does not exist; {hint}")
    return name


def arm(name: str, hook: Hook) -> None:
    """Call ``hook`` whenever ``name`` is reached, until it is disarmed."""
    _hooks[check_name(name)] = hook


def disarm(name: str | None = None) -> None:
    """Forget one hook, or all of them."""
    if name is None:
        _hooks.clear()
    else:
        _hooks.pop(name, None)


@contextmanager
def armed(name: str, hook: Hook) -> Iterator[None]:
    """Arm ``name`` inside a ``with`` block."""
    arm(name, hook)
    try:
        yield
    finally:
        disarm(name)


def hit(name: str, step: int = -1) -> None:
    """The program reached ``name``. Free when nothing is armed."""
    if _hooks and name in _hooks:
        _hooks[name](name, step)
