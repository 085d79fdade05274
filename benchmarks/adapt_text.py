"""Five kinds of bytes that every machine with this package has, cut by content into what a base, a task and a
validation see.

- docs: the topics of pydoc, which are the language reference as plain text;
- python: source of the standard library;
- c: the interpreter's C headers;
- law: paragraphs of the licences of installed packages, each kept once;
- arithmetic: lines such as ``318 + 47 = 365``, generated.

A piece (a topic, a file, a paragraph, a line) belongs to one part by the digest of its content, so that no piece that
is there twice is trained on and validated with.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from holdfast.trainer.config import DataConfig
from holdfast.trainer.sources import find_source

__all__ = ["ELSEWHERE", "KINDS", "Text", "read_texts"]

_SHARES = (("base", 2), ("train", 2), ("validation", 1))
_MOST_BYTES = 400_000
"""Of one part of one kind."""
_LEAST_BYTES = 4096
_SUMS = 60_000
ELSEWHERE = "law"
"""Part of what the base is trained on, and no task's: where drift is seen."""


@dataclass(frozen=True)
class Text:
    """Bytes of one kind: three uint8 vectors."""

    base: Tensor
    train: Tensor
    validation: Tensor

    @cached_property
    def digest(self) -> str:
        parts = (self.base, self.train, self.validation)
        return hashlib.blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=8).hexdigest()


def read_texts() -> dict[str, Text]:
    """By kind. Raises: SystemExit if this machine has too little of one."""
    return {kind: _divide(kind, pieces()) for kind, pieces in KINDS.items()}


def _docs() -> Iterator[bytes]:
    for file in find_source(DataConfig()).files:
        if file.name.startswith("pydoc_data/topics/"):
            yield b"".join(piece for piece, _ in file.pieces())


def _python() -> Iterator[bytes]:
    for file in find_source(DataConfig()).files:
        if file.name.endswith(".py"):
            yield b"".join(piece for piece, _ in file.pieces())


def _c() -> Iterator[bytes]:
    for path in sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h")):
        yield path.read_bytes()


def _law() -> Iterator[bytes]:
    paths, seen = sysconfig.get_paths(), set[bytes]()
    files = [*Path(paths["stdlib"]).glob("LICENSE*"), *Path(paths["purelib"]).rglob("*LICEN[CS]E*")]
    for path in sorted(path for path in files if path.is_file() and path.suffix not in (".py", ".pyc")):
        for paragraph in path.read_bytes().split(b"\n\n"):
            words = b" ".join(paragraph.split())
            if len(words) > 80 and words not in seen:
                seen.add(words)
                yield words + b"\n\n"


def _arithmetic() -> Iterator[bytes]:
    draw = random.Random(0)
    for _ in range(_SUMS):
        one, other, sign = draw.randrange(1000), draw.randrange(1000), draw.choice("+-*")
        result = {"+": one + other, "-": one - other, "*": one * other}[sign]
        yield f"{one} {sign} {other} = {result}\n".encode()


KINDS = {"docs": _docs, "python": _python, "c": _c, "law": _law, "arithmetic": _arithmetic}


def _divide(kind: str, pieces: Iterable[bytes]) -> Text:
    parts = {name: bytearray() for name, _ in _SHARES}
    names = [name for name, share in _SHARES for _ in range(share)]
    for piece in sorted(pieces, key=_number):  # so that a limit cuts off no letter of the alphabet
        part = parts[names[_number(piece) % len(names)]]
        part += piece[: _MOST_BYTES - len(part)]
    return Text(**_tensors(kind, parts))


def _number(piece: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "little")


def _tensors(kind: str, parts: Mapping[str, bytearray]) -> dict[str, Tensor]:
    if short := [f"{len(part):,} bytes for {name}" for name, part in parts.items() if len(part) < _LEAST_BYTES]:
        raise SystemExit(f"there is too little of {kind} here: {', '.join(short)}; at least {_LEAST_BYTES} are needed")
    return {name: torch.frombuffer(part, dtype=torch.uint8) for name, part in parts.items()}
