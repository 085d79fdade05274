"""A tokenised corpus on disk: ids as little-endian uint16 (uint32), one file per split, memory-mapped by every rank.

::

    <store>/train.bin  validation.bin     documents one after the other, each <bos> bytes <eos>
    <store>/train.len  validation.len     unless tokens are bytes: how many bytes of text each one takes, uint32
    <store>/manifest.arrow                Arrow IPC file: one row per source file and split; totals in its metadata

Nothing in it depends on the length of a sequence, the batch or the number of ranks. It is written once, by
:mod:`holdfast.trainer.token_writer`, and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from holdfast.errors import DataError
from holdfast.trainer.split import Split

__all__ = [
    "COLUMNS",
    "DTYPE",
    "FORMAT_VERSION",
    "LENGTHS_DTYPE",
    "MANIFEST",
    "METADATA_KEY",
    "WIDE_DTYPE",
    "TokenStore",
    "lengths_file",
    "split_file",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.arrow"
METADATA_KEY = b"holdfast"
DTYPE = np.dtype("<u2")
WIDE_DTYPE = np.dtype("<u4")
"""Of the tokens of a vocabulary of more than 65,536."""
LENGTHS_DTYPE = np.dtype("<u4")
COLUMNS = pa.schema(
    [
        ("name", pa.string()),
        ("split", pa.string()),
        ("documents", pa.int64()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
        ("licence", pa.string()),
        ("digest", pa.string()),  # xxh3-128 of the file's bytes in this split
    ]
)


def split_file(split: Split) -> str:
    """Name of the file that holds a split's tokens."""
    return f"{split.value}.bin"


def lengths_file(split: Split) -> str:
    """Name of the file that says how many bytes of text each token takes."""
    return f"{split.value}.len"


@dataclass(frozen=True, slots=True)
class TokenStore:
    """An intact store; the tokens stay on disk until they are touched."""

    path: Path
    title: str
    """Where the text came from, for the reader of a log."""
    digest: str
    """xxh3-128 of the tokens of both splits: equal exactly if a run sees the same tokens."""
    n_tokens: Mapping[Split, int]
    n_bytes: Mapping[Split, int]
    """Bytes of text."""
    documents: int
    licences: tuple[str, ...]
    token_bytes: int = DTYPE.itemsize
    """Size of a number on disk."""
    has_lengths: bool = False
    """Whether tokens are something else than bytes."""

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Check format and file sizes; the tokens are not read.

        Raises: DataError for anything but a complete store of a format this version reads.
        """
        path = Path(path)
        try:
            store = cls._from_metadata(path, _metadata(path / MANIFEST))
            sizes = {split: (path / split_file(split)).stat().st_size for split in Split}
            for split in Split if store.has_lengths else ():
                if (path / lengths_file(split)).stat().st_size != store.n_tokens[split] * LENGTHS_DTYPE.itemsize:
                    raise ValueError(f"{lengths_file(split)} has another length than the tokens")
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise _broken(path, f"is not a complete token store: {error}") from error
        for split, size in sizes.items():
            if size != store.n_tokens[split] * store.token_bytes or not size:
                need = f"{store.n_tokens[split]:,} tokens of {store.token_bytes} bytes"
                raise _broken(path / split_file(split), f"has {size:,} bytes, the manifest says {need}")
        return store

    @classmethod
    def _from_metadata(cls, path: Path, head: Mapping[str, Any]) -> TokenStore:  # Any: values of a JSON object
        if head["format_version"] != FORMAT_VERSION:
            found = f"format_version={head['format_version']}, written by {head.get('writer')}"
            raise ValueError(f"it has {found}; this version of Holdfast reads {FORMAT_VERSION}")
        return cls(
            path=path,
            title=str(head["title"]),
            digest=str(head["digest"]),
            n_tokens={split: int(head["tokens"][split.value]) for split in Split},
            n_bytes={split: int(head["bytes"][split.value]) for split in Split},
            documents=int(head["documents"]),
            licences=tuple(head["licences"]),
            token_bytes=int(head.get("token_bytes", DTYPE.itemsize)),
            has_lengths=bool(head.get("has_lengths", False)),
        )

    def tokens(self, split: Split) -> npt.NDArray[np.unsignedinteger]:
        """A read-only memory map, uint16 or uint32 [n_tokens]."""
        dtype = DTYPE if self.token_bytes == DTYPE.itemsize else WIDE_DTYPE
        return self._mapped(split_file(split), dtype, self.n_tokens[split])

    def lengths(self, split: Split) -> npt.NDArray[np.uint32] | None:
        """How many bytes of text each token takes, uint32 [n_tokens]; None where tokens are bytes."""
        if not self.has_lengths:
            return None
        return self._mapped(lengths_file(split), LENGTHS_DTYPE, self.n_tokens[split])

    def _mapped(self, name: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        mapped = np.memmap(self.path / name, dtype=dtype, mode="r", shape=(count,))
        return np.asarray(mapped)  # the same memory; slices of a memmap object cost twice as much


def _metadata(manifest: Path) -> Mapping[str, Any]:  # Any: values of a JSON object
    with manifest.open("rb") as file, pa.ipc.open_file(file) as reader:
        head = json.loads(reader.schema.metadata[METADATA_KEY])
    return dict(head)


def _broken(path: Path, problem: str) -> DataError:
    return DataError(str(path), f"{problem}; start the run again, or delete it: it is built anew from the text")
