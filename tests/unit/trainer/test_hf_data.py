"""Tokenizers and datasets of Hugging Face in the token store: no byte of text is lost or counted twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer import tokenizer
from holdfast.trainer.config import DataConfig, DataSource
from holdfast.trainer.corpus import prepare
from holdfast.trainer.data import Batches
from holdfast.trainer.hf_tokenizer import HfTokenizer, write_byte_tokenizer
from holdfast.trainer.split import Split
from holdfast.trainer.token_writer import StoreWriter, write_store
from holdfast.trainer.vocabulary import vocabulary_of

tokenizers: Any = pytest.importorskip("tokenizers", reason="needs the extra hf")
datasets: Any = pytest.importorskip("datasets", reason="needs the extra hf")

_TEXT = "héllo\n wörld €  🐙 twice twice \t end"
_SENTENCES = [f"sentence {i} says {i * 7 % 97} öre and {i * i % 89} € 🐙" for i in range(200)]


def _bpe(directory: Path, *, size: int = 400, lossy: bool = False) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>" if lossy else None))
    if lossy:  # drops white space and accents
        inner.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
        )
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "</s>"], show_progress=False)
    else:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    inner.train_from_iterator(_SENTENCES, trainer)
    directory.mkdir(exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


# -- one text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lossy", [False, True], ids=["byte-level", "lossy"])
@pytest.mark.parametrize("text", ["", "a", "   ", _TEXT, "🐙" * 50, *_SENTENCES[:3]])
def test_the_bytes_of_the_tokens_add_up_to_the_text(text: str, lossy: bool, tmp_path: Path) -> None:
    ids, lengths = HfTokenizer.read(str(_bpe(tmp_path, lossy=lossy))).encode(text.encode())
    assert lengths is not None and len(ids) == len(lengths)
    assert int(lengths.sum()) == (len(text.encode()) if len(ids) else 0)


def test_tokens_take_the_bytes_that_they_spell(tmp_path: Path) -> None:
    """Every token of a byte-level tokenizer that is no piece of a character is as long as what it decodes to."""
    read = HfTokenizer.read(str(_bpe(tmp_path)))
    ids, lengths = read.encode(b"sentence 7 says 49")
    assert lengths is not None
    assert [len(read.decode([number])) for number in ids.tolist()] == lengths.tolist()


def test_our_bytes_as_a_tokenizer_give_the_same_numbers(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    read, everything = HfTokenizer.read(str(tmp_path)), "".join(map(chr, range(0x250))) + _TEXT
    assert read.encode(everything.encode())[0].tolist() == tokenizer.encode(everything)
    assert read.decode(tokenizer.encode(everything)) == everything
    assert [read._inner.token_to_id(name) for name in ("<bos>", "<eos>", "<pad>")] == [256, 257, 258]


# -- the store --------------------------------------------------------------------------------------------------------


def _config(directory: Path, tokenizer_dir: Path | None, **options: Any) -> DataConfig:
    (directory / "text").mkdir()
    for number in range(0, len(_SENTENCES), 10):
        (directory / "text" / f"{number:03d}.txt").write_text("\n".join(_SENTENCES[number : number + 10]))
    return DataConfig(
        source=DataSource.TEXT,
        path=str(directory / "text"),
        seq_len=16,
        validation_share=0.2,
        tokenizer=str(tokenizer_dir or ""),
        **options,
    )


@pytest.mark.parametrize("lossy", [False, True], ids=["byte-level", "lossy"])
def test_the_bytes_of_all_windows_are_those_of_the_text(lossy: bool, tmp_path: Path) -> None:
    config = _config(tmp_path, _bpe(tmp_path / "tok", lossy=lossy))
    store = prepare(config, tmp_path / "cache")
    ours = prepare(DataConfig(**{**_fields(config), "tokenizer": ""}), tmp_path / "cache")
    assert store.n_bytes == ours.n_bytes and store.documents == ours.documents
    assert store.n_tokens[Split.TRAIN] < ours.n_tokens[Split.TRAIN]
    for split in Split:
        lengths = store.lengths(split)
        assert lengths is not None and int(lengths.sum()) == store.n_bytes[split]
    batches = Batches(store, seed=1, seq_len=4, global_batch=1, micro_batch=1, rank=0, world=1)
    counted = sum(n for step in range(batches.n_windows) for _, _, n in batches.microbatches(step))
    lengths = store.lengths(Split.TRAIN)
    assert lengths is not None and counted == int(lengths[1 : 4 * batches.n_windows + 1].sum())


def _fields(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DataConfig.__dataclass_fields__}


def test_documents_begin_and_end_with_the_tokens_that_the_settings_name(tmp_path: Path) -> None:
    config = _config(tmp_path, _bpe(tmp_path / "tok"))
    tokens = prepare(config, tmp_path / "cache").tokens(Split.TRAIN)
    assert tokens[0] == 0 and tokens[-1] == 1
    assert np.count_nonzero(tokens == 0) == np.count_nonzero(tokens == 1)


def test_another_tokenizer_is_another_store_and_bytes_keep_theirs(tmp_path: Path) -> None:
    config = _config(tmp_path, _bpe(tmp_path / "tok"))
    first = prepare(config, tmp_path / "cache")
    assert prepare(config, tmp_path / "cache").path == first.path
    _bpe(tmp_path / "tok", size=300)
    assert prepare(config, tmp_path / "cache").path != first.path


def test_numbers_above_65535_are_stored_in_four_bytes(tmp_path: Path) -> None:
    vocabulary = HfTokenizer.read(str(_bpe(tmp_path / "tok")))
    vocabulary.size, vocabulary.begin = 70_000, [69_999]

    def fill(writer: StoreWriter) -> None:
        writer.begin_file("one", "none")
        for split in Split:
            writer.append(split, b"some text", begins_document=True)
        writer.end_file()

    store = write_store(tmp_path / "store", "test", fill, vocabulary)
    assert store.token_bytes == 4 and store.tokens(Split.TRAIN)[0] == 69_999
    assert store.n_bytes[Split.TRAIN] == 9


def test_characters_that_pieces_of_text_cut_are_put_together(tmp_path: Path) -> None:
    vocabulary, text = HfTokenizer.read(str(_bpe(tmp_path / "tok"))), "🐙€ö x".encode()

    def fill(writer: StoreWriter) -> None:
        writer.begin_file("one", "none")
        writer.append(Split.VALIDATION, b"held out", begins_document=True)
        for number in range(len(text)):
            writer.append(Split.TRAIN, text[number : number + 1], begins_document=number == 0)
        writer.end_file()

    store = write_store(tmp_path / "store", "test", fill, vocabulary)
    lengths = store.lengths(Split.TRAIN)
    assert vocabulary.decode(store.tokens(Split.TRAIN).tolist()) == "🐙€ö x"
    assert lengths is not None and int(lengths.sum()) == len(text)


def test_what_is_not_utf8_is_refused_with_the_file(tmp_path: Path) -> None:
    config = _config(tmp_path, _bpe(tmp_path / "tok"))
    (tmp_path / "text" / "bad.txt").write_bytes(b"good \xff bad")
    with pytest.raises(DataError, match=r"bad\.txt.*not UTF-8, as data\.tokenizer needs it"):
        prepare(config, tmp_path / "cache")


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no tokenizer\.json"):
        vocabulary_of(DataConfig(tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="is no tokenizer"):
        vocabulary_of(DataConfig(tokenizer=str(tmp_path)))


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> Any:
    return datasets.Dataset.from_dict({"text": [*_SENTENCES, ""], "number": [*range(len(_SENTENCES)), 0]})


def _dataset(path: Path, **options: Any) -> DataConfig:
    return DataConfig(source=DataSource.HF, path=str(path), seq_len=16, validation_share=0.2, **options)


def _documents(config: DataConfig, cache: Path) -> list[str]:
    store = prepare(config, cache)
    found = []
    for split in Split:
        whole = store.tokens(split).tolist()
        text = "".join(chr(n) if n < 256 else "\n" for n in whole if n != tokenizer.BOS)
        found += text.encode("latin-1").decode().splitlines()
    return sorted(found)


def _layouts(rows: Any, directory: Path) -> Iterator[DataConfig]:
    rows.save_to_disk(str(directory / "one"))
    yield _dataset(directory / "one")
    datasets.DatasetDict({"train": rows.select([0]), "own": rows}).save_to_disk(str(directory / "several"))
    yield _dataset(directory / "several", split="own")
    for kind in ("parquet", "json"):
        (directory / kind).mkdir()
        getattr(rows, f"to_{kind}")(str(directory / kind / f"part.{kind}"))
        yield _dataset(directory / kind)


def test_every_row_of_a_dataset_is_one_document_whatever_holds_it(rows: Any, tmp_path: Path) -> None:
    for config in _layouts(rows, tmp_path):
        assert _documents(config, tmp_path / "cache") == sorted(_SENTENCES), config.path


def test_rows_are_divided_as_those_of_any_other_file(rows: Any, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    rows.to_parquet(str(tmp_path / "p" / "part.parquet"))
    other = DataConfig(**{**_fields(_dataset(tmp_path / "p")), "source": DataSource.PARQUET})
    other.path = str(tmp_path / "p" / "part.parquet")
    cache = tmp_path / "cache"
    assert prepare(_dataset(tmp_path / "p"), cache).digest == prepare(other, cache).digest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, r"has no split 'dev'; set data\.split to one of \['train'\]"),
        ({"field": "words"}, r"has no column 'words'; set data\.field to one of \['number', 'text'\]"),
        ({"field": "number"}, "column 'number' holds int, not a string"),
    ],
)
def test_what_a_dataset_does_not_have_is_refused(
    options: dict[str, Any], words: str, rows: Any, tmp_path: Path
) -> None:
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=words):
        prepare(_dataset(tmp_path / "d", **options), tmp_path / "cache")


def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        prepare(_dataset(tmp_path / "empty"), tmp_path / "cache")


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "datasets"])
def test_a_missing_package_is_named_with_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.trainer import hf, hf_dataset

    hf.library.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    write = {"transformers": hf.library, "datasets": hf_dataset._library}
    call = write.get(package, lambda: write_byte_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigurationError, match=r"pip install 'holdfast\[hf\]'"):
        call()
    hf.library.cache_clear()
