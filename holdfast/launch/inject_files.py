"""Wishes to inject a fault into a run that is going on, and what became of them, as files in its directory.

::

    inject/001.json            {"entry": "sigkill rank=1", "by": "you, pid 4242 on host"}
    inject/001.answer.json     {"state": "accepted", "detail": "", "step": -1}; replaced until the state is final
    inject/struck/             see holdfast.fault_tolerance.ledger

A file appears as a whole or not at all. A number is taken by whoever links its file first.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

__all__ = ["Answer", "State", "Wish", "answer", "answer_to", "ask", "struck_folder", "wishes"]


class State(str, Enum):
    """What became of a wish."""

    ACCEPTED = "accepted"
    """It will strike; not final."""
    REFUSED = "refused"
    STRUCK = "struck"
    MISSED = "missed"
    """It was accepted and did not strike: its step passed, or the run ended."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One entry that somebody wants to strike."""

    number: int
    entry: str
    by: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The driver's."""

    state: State
    detail: str = ""
    step: int = -1
    """Steps finished when it struck."""

    @property
    def is_final(self) -> bool:
        return self.state is not State.ACCEPTED


def struck_folder(run_dir: Path) -> Path:
    """Where the ledger of a run is."""
    return _folder(run_dir) / "struck"


def ask(run_dir: Path, entry: str, by: str) -> int:
    """Put a wish where the driver looks; its number. Raises: OSError."""
    folder = _folder(run_dir)
    folder.mkdir(exist_ok=True)
    unfinished = _written(folder, json.dumps({"entry": entry, "by": by}))
    try:
        number = max(_numbers(folder), default=0)
        while True:
            number += 1
            with suppress(FileExistsError):
                os.link(unfinished, folder / f"{number:03d}.json")
                return number
    finally:
        unfinished.unlink()


def wishes(run_dir: Path, after: int) -> Sequence[Wish]:
    """Those with a number above ``after``, in order. Whatever is no wish is one without an entry."""
    folder = _folder(run_dir)
    return [_wish(folder, number) for number in sorted(_numbers(folder)) if number > after]


def answer(run_dir: Path, number: int, found: Answer) -> None:
    """Say what became of a wish, instead of what was said before. Raises: OSError."""
    folder = _folder(run_dir)
    os.replace(_written(folder, json.dumps(asdict(found))), _answer_file(folder, number))


def answer_to(run_dir: Path, number: int) -> Answer | None:
    """What the driver has said so far, if anything."""
    try:
        found = json.loads(_answer_file(_folder(run_dir), number).read_text())
    except (OSError, ValueError):
        return None
    return Answer(State(found["state"]), found["detail"], found["step"])


def _folder(run_dir: Path) -> Path:
    return run_dir / "inject"


def _answer_file(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}.answer.json"


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [int(name.partition(".")[0]) for name in names if re.fullmatch(r"\d{3,}\.json", name)]


def _wish(folder: Path, number: int) -> Wish:
    try:
        found = json.loads((folder / f"{number:03d}.json").read_text())
        return Wish(number, str(found["entry"]), str(found.get("by", "")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Wish(number, "", "")


def _written(folder: Path, text: str) -> Path:
    path = folder / f".tmp-{uuid.uuid4().hex[:12]}"
    path.write_text(text)
    return path
