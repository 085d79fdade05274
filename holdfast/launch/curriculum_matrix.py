"""The matrix of a curriculum, read without torch from the file that ``holdfast adapt`` keeps beside its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["curriculum_rows"]


def curriculum_rows(run: Path) -> tuple[str, Sequence[Sequence[str]]] | None:
    """Name of the curriculum that a run, ``<name>.<task>``, belongs to, and bits per byte: a row of domains, one of the
    bare base, one after every task that acts. None for a run that belongs to none, or to one with nothing learned."""
    words = run.name.split(".")
    for end in range(len(words) - 1, 0, -1):
        folder = run.with_name(".".join(words[:end]))
        with suppress(OSError, ValueError, KeyError, TypeError):
            learned = json.loads((folder / "curriculum.json").read_bytes())["about"]["learned"]
            if rows := _rows([task for task in learned if task["directory"]]):
                return folder.name, rows
    return None


def _rows(kept: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    if not kept:
        return []
    domains = list(dict.fromkeys(str(task["domain"]) for task in kept))
    bare = {task["domain"]: task["base_bits"] for task in kept}
    rows = [["after", *domains], ["base", *(f"{bare[domain]:.3f}" for domain in domains)]]
    for task in kept:
        bits = task["bits"]
        rows.append([str(task["task"]), *(f"{bits[d]:.3f}" if d in bits else "" for d in domains)])
    return rows
