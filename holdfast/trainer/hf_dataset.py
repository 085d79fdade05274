"""Datasets of Hugging Face: the only door to datasets, which is imported when it is first needed.

Rows are read one after the other into the token store; a dataset may be larger than memory. No script is run: versions
that could run one are refused by the extra ``hf``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer.config import DataConfig
from holdfast.trainer.readers import Piece

__all__ = ["name_of", "read_dataset"]

_BATCH_ROWS = 256
_DEFAULT_SPLIT = "train"


def name_of(config: DataConfig) -> str:
    """For the reader of a log."""
    return f"{config.path}, {config.split or _DEFAULT_SPLIT}"


def read_dataset(config: DataConfig) -> Iterator[Piece]:
    """One document per row: string ``field``. Empty strings are passed over.

    Raises: DataError for a dataset that cannot be read, with the row for one without text.
    """
    row = 0
    for batch in _batches(config):
        if config.field not in batch:
            raise DataError(config.path, f"has no column {config.field!r}; set data.field to one of {sorted(batch)}")
        for text in batch[config.field]:
            row += 1
            if not isinstance(text, str):
                kind = type(text).__name__
                raise DataError(config.path, f"column {config.field!r} holds {kind}, not a string", row=row)
            if text:
                yield text.encode(), True


def _batches(config: DataConfig) -> Iterator[dict[str, list[object]]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from _open(config).iter(batch_size=_BATCH_ROWS)
    except (ConfigurationError, DataError):
        raise
    except Exception as error:  # whatever the library and its readers raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(config.path, f"cannot be read as a dataset: {said}") from error


def _open(config: DataConfig) -> Any:  # Any: datasets is not checked
    library, path, split = _library(), Path(config.path).expanduser(), config.split or _DEFAULT_SPLIT
    if (path / "dataset_dict.json").is_file():
        parts = library.load_from_disk(str(path))
        if split not in parts:
            raise DataError(config.path, f"has no split {split!r}; set data.split to one of {sorted(parts)}")
        return parts[split]
    if (path / "state.json").is_file():
        if config.split:
            raise DataError(config.path, f"is one split, and data.split={config.split!r} names another; leave it out")
        return library.load_from_disk(str(path))
    if path.is_file():
        raise DataError(config.path, "is a file; give its directory, or use data=parquet, data=jsonl or data=text")
    return library.load_dataset(str(path) if path.is_dir() else config.path, split=split, streaming=True)


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
    except ImportError as error:
        raise ConfigurationError(
            "data=hf needs datasets, which is not installed: pip install 'holdfast[hf]'"
        ) from error
    return datasets
