"""What has been injected into a run: one file per strike, there before it happens, so that no death can hide it.

The folder is below the run directory, which every process of a run shares. A file appears as a whole or not at all and
its name stands for one entry, rank or node, and step; whoever makes it strikes, so that nothing strikes twice: not in
the process that replaces its victim, not when the step is repeated, and not in a later attempt of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from holdfast.events import FaultInjected
from holdfast.fault_tolerance.chaos import ChaosFault

__all__ = ["Ledger"]

logger = logging.getLogger(__name__)

_UNFINISHED = ".tmp-"


class Ledger:
    """Used by every process that may be struck, and by the driver, which tells. Any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._claimed: set[str] = set()
        self._told: set[str] = set()

    def claim(self, fault: ChaosFault, step: int) -> bool:
        """Note that an entry without a rate is about to strike with ``step`` steps finished. False, and it must not
        strike, if that was noted before or cannot be noted."""
        name = _name(fault)
        if name in self._claimed:
            return False
        self._claimed.add(name)
        if (self.folder / name).exists():
            return False
        try:
            return self._note(name, json.dumps(asdict(fault.injected(step))))
        except OSError as error:
            logger.warning("chaos: %s does not strike, because %s cannot be written: %s", fault, self.folder, error)
            return False

    def has(self, fault: ChaosFault) -> bool:
        """Whether an entry without a rate has struck."""
        return (self.folder / _name(fault)).exists()

    def news(self) -> Sequence[FaultInjected]:
        """Driver. What has struck since this was asked last, in order."""
        found = sorted(self._untold(), key=lambda entry: entry.stat().st_mtime_ns)
        self._told.update(entry.name for entry in found)
        return [_event(Path(entry.path)) for entry in found]

    def _untold(self) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            yield from (e for e in entries if e.name not in self._told and _UNFINISHED not in e.name)

    def _note(self, name: str, text: str) -> bool:
        """A link fails if the name is taken, and cannot be seen half written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}{_UNFINISHED}{uuid.uuid4().hex[:12]}"
        try:
            unfinished.write_text(text)
            os.link(unfinished, self.folder / name)
        except FileExistsError:
            return False
        finally:
            unfinished.unlink(missing_ok=True)
        return True


def _event(path: Path) -> FaultInjected:
    return FaultInjected(**json.loads(path.read_text()))


def _name(fault: ChaosFault) -> str:
    key = f"{fault.source}/{fault.number}/{fault.step}".encode()
    return f"{fault.action.value}-{hashlib.sha256(key).hexdigest()[:24]}.json"
