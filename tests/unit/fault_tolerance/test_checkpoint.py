"""Names, commit record, listing, retention and quarantine of durable checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ManifestMismatch, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import DirectoryStorage, MemoryStorage, Storage, open_storage


@pytest.fixture(params=["directory", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3_uri"))
    return DirectoryStorage(tmp_path) if request.param == "directory" else MemoryStorage()


def write_ranks(storage: Storage, step: int, world: int = 2) -> dict[int, Mapping[str, Any]]:
    folder = checkpoint.directory(step)
    return {
        rank: checkpoint.write_rank(
            storage, folder, rank, data=[b"d" * 10, bytes([rank]) * step], manifest=f"manifest {step} {rank}".encode()
        )
        for rank in range(world)
    }


def write(storage: Storage, *steps: int, world: int = 2) -> None:
    for step in steps:
        receipts = write_ranks(storage, step, world)
        checkpoint.commit(storage, step, receipts=receipts, config_digest="cfg")


def good_steps(storage: Storage) -> list[int]:
    return [found.step for found in checkpoint.list_checkpoints(storage)[0]]


def reasons(storage: Storage) -> dict[str, str]:
    return {found.name: found.reason for found in checkpoint.list_checkpoints(storage)[1]}


# -- commit -----------------------------------------------------------------------------------------------------------


def test_the_layout_is_the_documented_one(storage: Storage) -> None:
    write(storage, 150)
    assert list(storage.list("")) == ["LATEST", "step-00000150"]
    assert list(storage.list("step-00000150")) == [
        "commit.json",
        "rank00000.bin",
        "rank00000.manifest.arrow",
        "rank00001.bin",
        "rank00001.manifest.arrow",
    ]
    assert storage.read("LATEST") == b"step-00000150\n"


def test_the_record_tells_who_wrote_what_and_when(storage: Storage) -> None:
    moment = datetime(2026, 11, 23, 23, 12, 4, tzinfo=timezone.utc)
    receipts = write_ranks(storage, 7)
    made = checkpoint.commit(storage, 7, receipts=receipts, config_digest="cfg", written_at=moment)
    assert checkpoint.read_commit(storage, 7) == made
    record = json.loads(storage.read("step-00000007/commit.json"))
    assert record["format_version"] == 1
    assert (record["step"], record["world"], record["config_digest"]) == (7, 2, "cfg")
    assert record["written_at"] == "2026-11-23T23:12:04+00:00"
    assert record["writer"].startswith("holdfast ")
    assert record["ranks"]["1"] == {
        "manifest_digest": "57efc4db393f41595fdf31d981a302ee",
        "bytes": 17 + 12,
        "files": {"rank00001.bin": 17, "rank00001.manifest.arrow": 12},
    }
    assert made.bytes == 2 * 29


def test_before_the_record_there_is_no_checkpoint(storage: Storage) -> None:
    write_ranks(storage, 5)
    assert checkpoint.list_checkpoints(storage) == ((), ())
    assert checkpoint.leftovers(storage) == ("step-00000005",)
    with pytest.raises(SnapshotError, match=r"step-00000005/commit\.json"):
        checkpoint.read_commit(storage, 5)


def test_the_record_is_written_after_everything_else_and_the_hint_after_it(tmp_path: Path) -> None:
    class Recording(DirectoryStorage):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.order: list[str] = []

        def write(self, path: str, buffers: Any) -> int:
            self.order.append(path.rpartition("/")[2])
            return super().write(path, buffers)

    storage = Recording(tmp_path)
    write(storage, 3, world=1)
    assert storage.order == ["rank00000.bin", "rank00000.manifest.arrow", "commit.json", "LATEST"]


@pytest.mark.parametrize("missing", ["rank00001.bin", "rank00000.manifest.arrow"])
def test_nothing_is_published_while_a_file_is_missing(storage: Storage, missing: str) -> None:
    receipts = write_ranks(storage, 5)
    storage.delete(f"step-00000005/{missing}")
    with pytest.raises(SnapshotError, match=f"{missing} is missing"):
        checkpoint.commit(storage, 5, receipts=receipts, config_digest="cfg")
    assert good_steps(storage) == [] and not storage.exists("LATEST")


def test_nothing_is_published_while_a_file_has_another_length_than_its_receipt(storage: Storage) -> None:
    receipts = write_ranks(storage, 5)
    storage.write("step-00000005/rank00001.bin", [b"short"])
    with pytest.raises(SnapshotError, match=r"rank00001\.bin has 5 bytes, 15 were written"):
        checkpoint.commit(storage, 5, receipts=receipts, config_digest="cfg")
    assert good_steps(storage) == []


@pytest.mark.parametrize("present", [[], [1], [0, 2]])
def test_nothing_is_published_without_every_rank(storage: Storage, present: list[int]) -> None:
    receipts = write_ranks(storage, 5, world=3)
    with pytest.raises(SnapshotError, match="not of all from 0 on"):
        checkpoint.commit(storage, 5, receipts={r: receipts[r] for r in present}, config_digest="cfg")
    assert good_steps(storage) == []


def test_a_receipt_of_other_files_is_refused(storage: Storage) -> None:
    receipts = write_ranks(storage, 5)
    with pytest.raises(SnapshotError, match="rank 0 names"):
        checkpoint.commit(storage, 5, receipts={0: receipts[1], 1: receipts[0]}, config_digest="cfg")


def test_a_commit_can_be_repeated_but_not_changed(storage: Storage) -> None:
    receipts = write_ranks(storage, 5)
    first = checkpoint.commit(storage, 5, receipts=receipts, config_digest="cfg")
    assert checkpoint.commit(storage, 5, receipts=receipts, config_digest="cfg") == first
    with pytest.raises(SnapshotError, match="with other content"):
        checkpoint.commit(storage, 5, receipts=receipts, config_digest="other")
    assert checkpoint.read_commit(storage, 5) == first


def test_a_published_checkpoint_is_never_written_to(storage: Storage) -> None:
    write(storage, 5)
    with pytest.raises(SnapshotError, match="never written to again"):
        checkpoint.write_rank(storage, "step-00000005", 0, data=[b"new"], manifest=b"new")
    assert good_steps(storage) == [5]


def test_an_interrupted_write_of_the_same_step_is_written_over(storage: Storage) -> None:
    write_ranks(storage, 5, world=3)
    write(storage, 5, world=2)
    (found,) = checkpoint.list_checkpoints(storage)[0]
    assert found.world == 2


def test_a_stale_hint_does_not_undo_a_commit(caplog: pytest.LogCaptureFixture) -> None:
    class NoHint(MemoryStorage):
        def write(self, path: str, buffers: Any) -> int:
            if path == "LATEST":
                raise SnapshotError("no space left")
            return super().write(path, buffers)

    storage = NoHint()
    write(storage, 5)
    assert good_steps(storage) == [5]
    assert "LATEST was not updated: no space left" in caplog.text


# -- reading ----------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_comes_first_whatever_the_hint_says(storage: Storage) -> None:
    write(storage, 100, 9, 1000)
    storage.write("LATEST", [b"step-00000009\n"])
    assert good_steps(storage) == [1000, 100, 9]
    assert checkpoint.latest(storage) == 9


@pytest.mark.parametrize("content", [b"", b"step-5", b"\xff\xfe", b"../../etc", b"step-00000005.tmp"])
def test_a_hint_that_names_nothing_is_no_hint(storage: Storage, content: bytes) -> None:
    assert checkpoint.latest(storage) is None
    storage.write("LATEST", [content])
    assert checkpoint.latest(storage) is None


def test_a_missing_or_shortened_file_rejects_the_checkpoint_with_the_reason(storage: Storage) -> None:
    write(storage, 1, 2, 3)
    storage.delete("step-00000003/rank00000.bin")
    storage.write("step-00000002/rank00001.manifest.arrow", [b"x"])
    assert good_steps(storage) == [1]
    assert reasons(storage) == {
        "step-00000002": "step-00000002/rank00001.manifest.arrow has 1 bytes, 12 were written",
        "step-00000003": "step-00000003/rank00000.bin is missing",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "", "is no commit record"),
        (lambda text: "[]", "is no commit record"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "format_version=2"),
        (lambda text: text.replace('"step": 5', '"step": 6'), "digest does not match"),
        (lambda text: text.replace('"bytes": 27', '"bytes": 28'), "digest does not match"),
        (lambda text: text.replace('"digest"', '"tsegid"'), "digest"),
    ],
)
def test_a_damaged_or_foreign_record_is_rejected_with_the_reason(storage: Storage, change: Any, reason: str) -> None:
    write(storage, 5)
    text = storage.read("step-00000005/commit.json").decode()
    assert change(text) != text
    storage.write("step-00000005/commit.json", [change(text).encode()])
    assert good_steps(storage) == []
    assert reason in reasons(storage)["step-00000005"]


def test_a_checkpoint_under_another_name_is_rejected(storage: Storage) -> None:
    write(storage, 5)
    storage.rename("step-00000005", "step-00000006")
    assert "is the record of step 5" in reasons(storage)["step-00000006"]


def test_other_files_beside_the_checkpoints_are_left_alone(storage: Storage) -> None:
    write(storage, 5)
    for path in ("notes.txt", "step-5/x", "step-000000005/x", "best/step-00000009/commit.json"):
        storage.write(path, [b"x"])
    assert good_steps(storage) == [5] and reasons(storage) == {} and checkpoint.leftovers(storage) == ()
    checkpoint.retain(storage, 1)
    assert storage.exists("notes.txt") and storage.exists("step-5/x") and storage.exists("step-000000005/x")


def test_a_step_beyond_eight_digits_has_a_name() -> None:
    storage = MemoryStorage()
    assert checkpoint.step_of(checkpoint.directory(123_456_789)) == 123_456_789
    write(storage, 99_999_999, 100_000_000)
    assert good_steps(storage) == [100_000_000, 99_999_999]


def test_a_rank_is_read_back_as_committed(storage: Storage) -> None:
    write(storage, 5)
    assert checkpoint.read_rank(storage, "step-00000005", 1) == (b"manifest 5 1", b"d" * 10 + b"\1" * 5)


def test_a_rank_that_did_not_write_is_a_mismatch(storage: Storage) -> None:
    write(storage, 5)
    with pytest.raises(ManifestMismatch, match="written by 2 ranks; there is no rank 2"):
        checkpoint.read_rank(storage, "step-00000005", 2)


def test_an_uncommitted_rank_is_not_read(storage: Storage) -> None:
    write_ranks(storage, 5)
    with pytest.raises(SnapshotError, match=r"commit\.json"):
        checkpoint.read_rank(storage, "step-00000005", 0)


def test_a_manifest_of_equal_length_and_other_bytes_is_corrupt(storage: Storage) -> None:
    write(storage, 5)
    storage.write("step-00000005/rank00001.manifest.arrow", [b"manifest 5 2"])
    with pytest.raises(ShardCorrupt) as caught:
        checkpoint.read_rank(storage, "step-00000005", 1)
    assert (caught.value.rank, caught.value.version) == (1, 5)
    assert checkpoint.read_rank(storage, "step-00000005", 0)


# -- retention and quarantine -----------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_the_rest_go(storage: Storage) -> None:
    write(storage, 1, 2, 3, 4)
    assert checkpoint.retain(storage, 2) == ("step-00000002", "step-00000001")
    assert good_steps(storage) == [4, 3]


@pytest.mark.parametrize("keep_last", [0, -1, 1])
def test_the_newest_good_one_is_never_deleted(storage: Storage, keep_last: int) -> None:
    write(storage, 1, 2)
    checkpoint.retain(storage, keep_last)
    assert good_steps(storage) == [2]


def test_a_bad_newest_one_does_not_push_out_a_good_one(storage: Storage) -> None:
    write(storage, 1, 2, 3)
    storage.delete("step-00000003/rank00000.bin")
    storage.delete("LATEST")
    assert checkpoint.retain(storage, 1) == ("step-00000001",)
    assert good_steps(storage) == [2]
    assert "step-00000003" in reasons(storage)


def test_what_the_hint_names_is_never_deleted(storage: Storage) -> None:
    write(storage, 1, 2, 3)
    storage.write("LATEST", [b"step-00000001\n"])
    checkpoint.retain(storage, 1)
    assert good_steps(storage) == [3, 1]


def test_interrupted_writes_go_once_a_newer_checkpoint_is_good(storage: Storage) -> None:
    write(storage, 2)
    write_ranks(storage, 1)
    write_ranks(storage, 3)
    checkpoint.retain(storage, 2)
    assert checkpoint.leftovers(storage) == ("step-00000003",)


def test_nothing_is_deleted_while_nothing_is_good(storage: Storage) -> None:
    write_ranks(storage, 1)
    write(storage, 2)
    storage.delete("step-00000002/rank00000.bin")
    assert checkpoint.retain(storage, 1) == ()
    assert checkpoint.leftovers(storage) == ("step-00000001",)


def test_a_quarantined_checkpoint_keeps_its_files_and_its_reason_and_is_not_used(storage: Storage) -> None:
    write(storage, 1, 2)
    assert checkpoint.quarantine(storage, 2, "slice 'w' of rank 1 is damaged") == "rejected-step-00000002"
    assert good_steps(storage) == [1]
    assert reasons(storage) == {"rejected-step-00000002": "slice 'w' of rank 1 is damaged"}
    assert storage.exists("rejected-step-00000002/rank00001.bin")
    checkpoint.retain(storage, 1)
    assert reasons(storage)


def test_the_same_step_can_be_written_and_quarantined_again(storage: Storage) -> None:
    for reason in ("first", "second", "third"):
        write(storage, 2)
        checkpoint.quarantine(storage, 2, reason)
    assert reasons(storage) == {
        "rejected-step-00000002": "first",
        "rejected-step-00000002-2": "second",
        "rejected-step-00000002-3": "third",
    }


def test_a_quarantine_cut_short_before_its_reason_still_holds(storage: Storage) -> None:
    write(storage, 2)
    storage.rename("step-00000002", "rejected-step-00000002")
    assert reasons(storage) == {"rejected-step-00000002": "quarantined, the reason was not recorded"}


def test_a_record_lists_ranks_in_numbers_not_words() -> None:
    storage = MemoryStorage()
    write(storage, 1, world=12)
    found = checkpoint.read_commit(storage, 1)
    assert list(found.ranks) == list(range(12))
    assert replace(found, step=1) == found
