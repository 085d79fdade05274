"""What the text that a run reads must obey, its files and its tokenizer included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.trainer.config import DataSource
from holdfast.trainer.models import model_of
from holdfast.trainer.vocabulary import vocabulary_of

__all__ = ["data_problems", "missing_files"]


def data_problems(config: RunConfig) -> Iterator[str]:
    source, path = config.data.source, config.data.path
    if source is DataSource.LOCAL and path:
        yield f"data.path={path!r} is not read by data=local; add data=text, data=jsonl or data=parquet"
    if source is not DataSource.LOCAL and not path:
        yield f"data.path is empty, but data={source.value} needs it: data.path=<file or directory>"
    if config.data.split and source is not DataSource.HF:
        yield f"data.split={config.data.split!r} is of data=hf; leave it out"
    if source in (DataSource.JSONL, DataSource.PARQUET, DataSource.HF) and not config.data.field:
        yield f"data.field is empty, but data={source.value} needs the name of the field that holds the text"


def missing_files(config: RunConfig, *, is_sound: bool) -> list[str]:
    paths = {f"adapter.seen.{name}": path for name, path in config.adapter.seen.items()}
    if config.data.source not in (DataSource.LOCAL, DataSource.HF) and config.data.path:
        paths["data.path"] = config.data.path
    return (_unfit_tokenizer(config) if is_sound else []) + [
        f"{key}={path!r} does not exist on this machine, which reads it before the workers start"
        for key, path in paths.items()
        if not Path(str(path)).exists()
    ]


def _unfit_tokenizer(config: RunConfig) -> list[str]:
    try:
        have, need = model_of(config.model).vocab_size, vocabulary_of(config.data).size
    except ConfigurationError as error:
        return list(error.problems)
    if not config.data.tokenizer or have == 0 or need <= have:
        return []
    return [
        f"data.tokenizer={config.data.tokenizer!r} has {need:,} tokens, more than the model's vocabulary of {have:,}"
    ]
