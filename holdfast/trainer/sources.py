"""Which files a :class:`DataConfig` stands for, in a fixed order and under names that do not depend on the machine."""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer.config import DataConfig, DataSource
from holdfast.trainer.hf_dataset import name_of, read_dataset
from holdfast.trainer.readers import CODECS, Piece, read_jsonl, read_parquet, read_text, unreadable

__all__ = ["Source", "SourceFile", "find_source"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Something with a name that holds documents."""

    name: str
    """Relative to the source, with ``/`` between the parts."""
    origin: str
    """What an error calls it: the whole path."""
    stamp: str
    """Differs when the content may differ: size and time of the last change."""
    licence: str
    pieces: Callable[[], Iterator[Piece]]
    """Reads it from its beginning."""


@dataclass(frozen=True, slots=True)
class Source:
    """All files of a corpus, sorted by name."""

    title: str
    """For the reader of a log."""
    origin: str
    build: str
    """What the content depends on besides the files; empty if nothing."""
    files: tuple[SourceFile, ...]


def find_source(config: DataConfig) -> Source:
    """The files that ``config`` stands for; none of them is read yet.

    Raises: DataError when there are none or one cannot be read, ConfigurationError without a path.
    """
    if config.source is DataSource.LOCAL:
        return _standard_library()
    return _dataset(config) if config.source is DataSource.HF else _own_files(config)


# -- the running interpreter ------------------------------------------------------------------------------------------

_NO_TEXT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"})
"""Folders passed over: other people's packages, and tests and tables that read like nothing else."""
_TOPICS = "pydoc_data/topics.py"
_LICENCE = "PSF-2.0"


def _standard_library() -> Source:
    """Source of the standard library; the topics of pydoc as the text they hold, one file each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {name: path for name, path in _below(root, _NO_TEXT) if name.endswith(".py") and path.stat().st_size}
    topics = list(_pydoc_topics(files.pop(_TOPICS))) if _TOPICS in files else []
    modules = [_text_file(name, path, _LICENCE) for name, path in files.items()]
    if not modules:
        raise DataError(str(root), "holds no *.py, the standard library is not there; set data.source and data.path")
    title = "local: standard library" + (" + pydoc topics" if topics else "")
    return Source(title, str(root), sys.version, tuple(sorted([*modules, *topics], key=_by_name)))


def _pydoc_topics(module: Path) -> Iterator[SourceFile]:
    topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    for topic, text in topics.items():
        name = f"pydoc_data/topics/{topic}"
        yield SourceFile(name, f"{module}, topic {topic!r}", _stamp(module), _LICENCE, _whole(text.encode()))


def _whole(text: bytes) -> Callable[[], Iterator[Piece]]:
    return lambda: iter([(text, True)])


# -- the user's own files ---------------------------------------------------------------------------------------------

_SUFFIXES: Mapping[DataSource, tuple[str, ...]] = {
    DataSource.TEXT: tuple(
        ".txt .text .md .rst .tex .html .py .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .sh .sql".split()
    ),
    DataSource.JSONL: (".jsonl", ".ndjson"),
    DataSource.PARQUET: (".parquet", ".pq"),
}
"""What is looked for in a directory; a file that is named may be called anything."""
_OWN_LICENCE = "licence not stated"


def _own_files(config: DataConfig) -> Source:
    kind = config.source
    if not config.path:
        raise ConfigurationError(f"data.source={kind.name} needs data.path=<file or directory>")
    root = Path(config.path).expanduser().absolute()
    found = _matching(root, kind) if root.is_dir() else [(root.name, root)]
    files = tuple(sorted((_own_file(name, path, config) for name, path in found), key=_by_name))
    count = f" ({len(files):,} file{'s' * (len(files) > 1)})" if root.is_dir() else ""
    return Source(f"{kind.value}: {root}{count}", str(root), "", files)


def _own_file(name: str, path: Path, config: DataConfig) -> SourceFile:
    if config.source is DataSource.TEXT:
        return _text_file(name, path, _OWN_LICENCE)
    read = read_jsonl if config.source is DataSource.JSONL else read_parquet
    return SourceFile(name, str(path), _stamp(path), _OWN_LICENCE, lambda: read(path, config.field))


def _matching(root: Path, kind: DataSource) -> list[tuple[str, Path]]:
    codecs = () if kind is DataSource.PARQUET else tuple(CODECS)  # parquet compresses inside
    suffixes = tuple(suffix + codec for suffix in _SUFFIXES[kind] for codec in ("", *codecs))
    found = [(name, path) for name, path in _below(root) if name.lower().endswith(suffixes)]
    if not found:
        wanted = " ".join(f"*{suffix}" for suffix in _SUFFIXES[kind])
        packed = f" (or that and {' '.join(codecs)})" if codecs else ""
        raise DataError(
            str(root),
            f"holds no {wanted}{packed}, not in any folder below it either; names that begin with a dot are passed "
            f"over; name a single file, or choose another data.source than {kind.name}",
        )
    return found


def _dataset(config: DataConfig) -> Source:
    """Of Hugging Face: one file, whose rows are divided. A name of the hub has no stamp: it means one content."""
    if not config.path:
        raise ConfigurationError("data.source=HF needs data.path=<directory or name>")
    root = Path(config.path).expanduser()
    stamps = sorted((name, _stamp(path)) for name, path in _below(root)) if root.is_dir() else []
    rows = SourceFile("rows", config.path, repr(stamps), _OWN_LICENCE, lambda: read_dataset(config))
    return Source(f"hf: {name_of(config)}", config.path, "", (rows,))


# -- both -------------------------------------------------------------------------------------------------------------


def _text_file(name: str, path: Path, licence: str) -> SourceFile:
    return SourceFile(name, str(path), _stamp(path), licence, lambda: read_text(path))


def _below(root: Path, passed_over: frozenset[str] = frozenset()) -> Iterator[tuple[str, Path]]:
    """Every file at any depth with its name relative to ``root``; nothing that is hidden, no link to a directory."""

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise unreadable(Path(error.filename), error) from error

    for folder, directories, names in os.walk(root, onerror=refuse):
        directories[:] = [d for d in directories if d not in passed_over and not d.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _by_name(file: SourceFile) -> str:
    return file.name


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(str(path), "is not a regular file; name a file or a directory")
    return f"{status.st_size} {status.st_mtime_ns}"
