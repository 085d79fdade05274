"""Batches: which tokens a rank sees, whatever the number of ranks, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer.data import Batches, Windows, target_bytes
from holdfast.trainer.split import Split
from holdfast.trainer.token_store import TokenStore
from holdfast.trainer.token_writer import StoreWriter, write_store

SEQ_LEN = 8
TRAIN_BYTES, HELD_OUT_BYTES = 1000, 165


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """125 training windows and 20 to validate on, no two of them alike."""
    rng = np.random.default_rng(1)

    def fill(writer: StoreWriter) -> None:
        writer.begin_file("a", "")
        for split, size in ((Split.TRAIN, TRAIN_BYTES), (Split.VALIDATION, HELD_OUT_BYTES)):
            writer.append(split, rng.integers(0, 256, size, np.uint8).tobytes(), begins_document=True)
        writer.end_file()

    return write_store(tmp_path_factory.mktemp("cache") / "store", "", fill)


def stream(store: TokenStore, split: Split) -> list[int]:
    raw = (store.path / f"{split.value}.bin").read_bytes()
    return [int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)]


def open_batches(store: TokenStore, **options: Any) -> Batches:
    defaults = {"seed": 3, "seq_len": SEQ_LEN, "global_batch": 12, "micro_batch": 2, "rank": 0, "world": 1}
    return Batches.open(store.path, **{**defaults, **options})


def rows(batches: Iterable[tuple[Tensor, Tensor, int]]) -> list[tuple[int, ...]]:
    """The windows, each with its targets' last token."""
    return [(*t, int(y[-1])) for tokens, targets, _ in batches for t, y in zip(tokens.tolist(), targets, strict=True)]


def windows(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + SEQ_LEN + 1]) for i in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)]


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_microbatch_is_two_int64_tensors_and_targets_are_the_next_tokens(store: TokenStore) -> None:
    batches = list(open_batches(store).microbatches(0))
    assert len(batches) == 6
    for tokens, targets, n_bytes in batches:
        assert n_bytes == target_bytes(targets)
        assert tokens.shape == targets.shape == (2, SEQ_LEN)
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
        assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_one_pass_shows_every_window_once(store: TokenStore) -> None:
    want = windows(stream(store, Split.TRAIN))
    batches = open_batches(store, global_batch=25, micro_batch=5)
    assert batches.n_windows == len(want) == 125
    first = [row for step in range(5) for row in rows(batches.microbatches(step))]
    second = [row for step in range(5, 10) for row in rows(batches.microbatches(step))]
    assert Counter(first) == Counter(second) == Counter(want)
    assert first != second
    assert first != want


@pytest.mark.parametrize("world", [2, 3, 6])
def test_any_number_of_ranks_sees_the_same_global_batch(store: TokenStore, world: int) -> None:
    for step in (0, 9, 10, 12_345):  # steps 10 and later straddle passes
        alone = rows(open_batches(store).microbatches(step))
        together = [
            row for rank in range(world) for row in rows(open_batches(store, rank=rank, world=world).microbatches(step))
        ]
        assert together == alone


def test_the_size_of_a_microbatch_does_not_change_the_samples(store: TokenStore) -> None:
    assert rows(open_batches(store, micro_batch=4).microbatches(7)) == rows(open_batches(store).microbatches(7))


def test_a_step_is_the_same_whenever_it_is_asked_for(store: TokenStore) -> None:
    batches = open_batches(store)
    forward = [rows(batches.microbatches(step)) for step in range(20)]
    assert [rows(batches.microbatches(step)) for step in reversed(range(20))] == forward[::-1]
    assert rows(open_batches(store).microbatches(13)) == forward[13]


def test_another_seed_is_another_order(store: TokenStore) -> None:
    assert rows(open_batches(store, seed=4).microbatches(0)) != rows(open_batches(store).microbatches(0))


def test_a_batch_belongs_to_its_taker(store: TokenStore) -> None:
    batches = open_batches(store)
    before = rows(batches.microbatches(0))
    for tokens, targets, _ in batches.microbatches(0):
        tokens.zero_()
        targets.zero_()
    assert rows(batches.microbatches(0)) == before


@pytest.mark.parametrize(("n_tokens", "n_windows"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_a_window_needs_one_token_more_than_its_length(n_tokens: int, n_windows: int) -> None:
    cut = Windows(np.arange(n_tokens, dtype=np.uint16), SEQ_LEN)
    assert len(cut) == n_windows
    assert rows([cut.stack(range(n_windows))]) == windows(list(range(n_tokens)))


# -- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("wanted", [1, 5, 12, 20, 96])
def test_ranks_validate_in_step_and_no_window_counts_twice(store: TokenStore, world: int, wanted: int) -> None:
    ranks = [
        list(open_batches(store, global_batch=world, micro_batch=1, world=world, rank=rank).validation(wanted, 4))
        for rank in range(world)
    ]
    shapes = [[tokens.shape for tokens, _, _ in batches] for batches in ranks]
    assert all(mine == shapes[0] for mine in shapes)
    seen = [row for batches in ranks for row in rows(batches)]
    assert len(seen) == max(min(wanted, 20) // world * world, world)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(windows(stream(store, Split.VALIDATION)))


def test_validation_windows_are_evenly_spaced_and_always_the_same(store: TokenStore) -> None:
    want = windows(stream(store, Split.VALIDATION))
    assert len(want) == 20
    batches = open_batches(store, seed=99)
    assert rows(batches.validation(5, 2)) == want[::4]
    assert rows(batches.validation(5, 2)) == want[::4]
    assert rows(batches.validation(1000, 3)) == want
    assert batches.n_validation(1000) == 20


def test_the_number_of_validation_windows_is_a_multiple_of_the_ranks(store: TokenStore) -> None:
    batches = open_batches(store, world=3)
    assert [batches.n_validation(n) for n in (0, 1, 3, 5, 6, 19, 20, 96)] == [3, 3, 3, 3, 6, 18, 18, 18]


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_special_targets_are_not_bytes() -> None:
    assert target_bytes(torch.tensor([[0, 255, 256], [257, 258, 97]])) == 3


def test_the_targets_of_a_pass_are_all_bytes_but_the_end(store: TokenStore) -> None:
    batches = open_batches(store, global_batch=125, micro_batch=125)
    assert sum(n_bytes for _, _, n_bytes in batches.microbatches(0)) == TRAIN_BYTES


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "near"),
    [((10, 4, 1), 8), ((12, 4, 2), 16), ((1, 8, 3), 24), ((0, 2, 2), 4), ((4, 0, 2), 4)],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    store: TokenStore, sizes: tuple[int, int, int], near: int
) -> None:
    global_batch, micro_batch, world = sizes
    words = f"global_batch={global_batch} must be .*micro_batch={micro_batch} x {world} ranks.*global_batch={near}$"
    with pytest.raises(ConfigurationError, match=words):
        open_batches(store, global_batch=global_batch, micro_batch=micro_batch, world=world)


def test_too_few_windows_are_refused_before_the_first_step(store: TokenStore) -> None:
    with pytest.raises(DataError, match=r"1,002 tokens for train make 0 windows of data\.seq_len=2000, at least 1 "):
        open_batches(store, seq_len=2000)
    with pytest.raises(
        DataError, match=r"167 tokens for validation make 20 windows .* at least 21 must be there; add text"
    ):
        open_batches(store, world=21, global_batch=42)


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a complete token store"):
        Batches.open(tmp_path, seed=0, seq_len=8, global_batch=1, micro_batch=1, rank=0, world=1)
