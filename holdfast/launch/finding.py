"""One line of ``holdfast doctor``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BAD", "OK", "WARN", "Finding"]

OK, WARN, BAD = "OK", "WARN", "BAD"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and in ``text`` what was found; unless that is OK, with the way out."""

    level: str
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:4}  {self.about:10}  {self.text}"
