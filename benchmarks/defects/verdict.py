"""How each script here ends: what the peer did, what Holdfast did, and a status that says whether the page holds."""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

import torch

__all__ = ["CannotTell", "Finding", "Kind", "Outcome", "conclude", "known", "ours"]


Kind = Callable[..., torch.optim.Optimizer]
"""A class of optimizers, with its own options."""


class Outcome(IntEnum):
    """Exit status of a script."""

    AS_DESCRIBED = 0
    """The peer shows the defect, Holdfast does not."""
    OURS_SHOWS_IT = 1
    FIXED = 3
    """The peer no longer shows it: docs/peer-defects.md has to be updated."""
    CANNOT_TELL = 4
    """A peer or one of our classes is not there, or the script broke."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one side did."""

    text: str
    shows_it: bool


class CannotTell(Exception):
    """Something needed for the comparison is not there."""


def ours(name: str) -> Kind:
    """Raises: CannotTell when this Holdfast has no such optimizer yet."""
    import holdfast.optim  # here, because run_all.py puts it on the scripts' path and not on its own

    if name not in holdfast.optim.__all__:
        raise CannotTell(f"holdfast.optim has no {name} in this checkout")
    kind: Kind = getattr(holdfast.optim, name)
    return kind


def known(error: str, phrase: str, otherwise: str) -> Finding:
    """The peer's error if it is the one described, and ``otherwise`` when there was none.

    Raises: CannotTell for another error, which shows nothing.
    """
    if error and phrase not in error:
        raise CannotTell(f"another error than the one described: {error}")
    return Finding(error or otherwise, bool(error))


def conclude(theirs: Callable[[], Finding], own: Callable[[], Finding]) -> None:
    """Print what the peer did and what Holdfast did, and exit with an ``Outcome``."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # both peers complain of what they could not load
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing compiled yet, whatever ran here before
        peer, holdfast_ = _look("peer", theirs), _look("ours", own)
    if peer is None or holdfast_ is None:
        _leave(Outcome.CANNOT_TELL)
    if holdfast_.shows_it:
        _leave(Outcome.OURS_SHOWS_IT)
    _leave(Outcome.AS_DESCRIBED if peer.shows_it else Outcome.FIXED)


def _look(who: str, side: Callable[[], Finding]) -> Finding | None:
    torch.manual_seed(0)
    try:
        found = side()
    except (CannotTell, ImportError) as error:
        print(f"{who}: {error}", flush=True)
        return None
    except Exception:  # at the edge of a process: a traceback's usual status of 1 would blame Holdfast
        print(f"{who}: {traceback.format_exc()}", flush=True)
        return None
    print(f"{who}: {found.text}", flush=True)
    return found


def _leave(outcome: Outcome) -> NoReturn:
    print(outcome.name.lower().replace("_", " "), flush=True)
    os._exit(outcome)  # without waiting for what a compiler may have left running
