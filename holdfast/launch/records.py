"""Small files of a run: events line by line, the configuration as yaml, the ends of logs."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.events import Event, to_record
from holdfast.trainer.jsonl import JsonLines

__all__ = ["JsonlEvents", "last_step", "nested", "read_yaml", "tail", "to_yaml"]

_TAIL_BYTES = 1 << 20
_METRICS_LINES = 100
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_TEXT = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Words that yaml 1.1 takes for truth values or for nothing."""


class JsonlEvents:
    """Event sink: one JSON line per event, in the file when ``emit`` returns; see :class:`JsonLines`."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._lines, self._clock = JsonLines(path), clock

    def emit(self, event: Event) -> None:
        self._lines.append(to_record(event, time_s=self._clock()))


def tail(path: Path, lines: int) -> str:
    """The last ``lines`` lines of a log, as far as its last megabyte has them. Raises: OSError."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        kept = file.read().decode(errors="replace").splitlines(keepends=True)[-lines:]
    return "".join(kept)


def last_step(metrics: Path) -> int:
    """The last step that was recorded, as far as the end of the file has one; -1 without. What a driver that was killed
    has written of a line does not count."""
    with suppress(FileNotFoundError):
        for line in reversed(tail(metrics, _METRICS_LINES).splitlines()):
            with suppress(ValueError):
                record = json.loads(line)
                if "loss" in record:
                    return int(record["step"])
    return -1


def to_yaml(plain: Mapping[str, object]) -> str:
    """Nested mappings of JSON values as yaml that every parser reads back to the same values."""
    return "".join(f"{line}\n" for line in _lines(plain, "")) or "{}\n"


def read_yaml(path: Path) -> dict[str, object]:
    """Dotted key -> value of a file that :func:`to_yaml` wrote; nothing without a file.

    Left out is what yaml and JSON write differently: infinities, and mappings inside lists.
    """
    found: dict[str, object] = {}
    keys: list[str] = []
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            indent, key, value = _LINE.findall(line)[0]
            with suppress(ValueError):
                keys[len(indent) // 2 :] = [str(_from_json(key)) if key.startswith('"') else key]
                found[".".join(keys)] = _from_json(value)
    return found


def nested(flat: Mapping[str, object]) -> dict[str, object]:
    """Sections inside sections, from dotted keys."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return found


_LINE = re.compile(r'( *)("(?:[^"\\]|\\.)*"|[^:]*):?(.*)')
_ESCAPED = re.compile(r"\\(?:U([0-9a-f]{8})|.)")


def _from_json(text: str) -> object:
    plain: object = json.loads(_ESCAPED.sub(_as_json_has_it, text))
    return plain


def _as_json_has_it(escaped: re.Match[str]) -> str:
    """JSON has no escape of eight digits, but two of four."""
    return json.dumps(chr(int(escaped[1], 16)))[1:-1] if escaped[1] else escaped[0]


def _lines(section: Mapping[str, object], indent: str) -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_key(key)}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{_key(key)}: {_scalar(value)}"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) and name.lower() not in _NOT_TEXT else _quoted(name)


def _scalar(value: object) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(k)}: {_scalar(v)}' for k, v in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_scalar, value))}]"
    return json.dumps(value)  # whole numbers, true, false and null are written alike


def _quoted(text: str) -> str:
    """Always quoted: yaml takes bare ``no`` and ``1e3`` for other things than text."""
    escaped = (c if c.isprintable() else f"\\U{ord(c):08x}" for c in text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{"".join(escaped)}"'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text  # yaml 1.1: 1e-05 would be text
