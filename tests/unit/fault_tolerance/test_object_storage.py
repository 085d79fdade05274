"""What can go wrong with an object store: broken ways, interruptions, half-renamed directories, unreadable errors."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from holdfast.clock import FakeClock
from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import checkpoint, object_storage
from holdfast.fault_tolerance.object_storage import ObjectStorage, RenamingStorage
from holdfast.fault_tolerance.storage import DirectoryStorage, Storage, open_storage
from holdfast.fault_tolerance.throttle import PART_BYTES, Throttle
from tests.support.s3 import BrokenWay, S3Server, s3_server


class _Interrupting(FakeClock):
    """Somebody does something while the writer waits for its turn."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self._act = act

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._act()


def _interrupt() -> None:
    raise KeyboardInterrupt


class _Dying:
    """A file system whose ``moment``-th change is never made, nor any after it."""

    CHANGES = ("copy_file", "delete_file", "delete_dir", "move", "create_dir", "open_output_stream")

    def __init__(self, files: Any, moment: int) -> None:
        self._files, self.left = files, moment

    def __getattr__(self, name: str) -> Any:
        if name not in self.CHANGES:
            return getattr(self._files, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError("the writer is dead")
            return getattr(self._files, name)(*args, **kwargs)

        return change


# -- writes that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "after"), [(100, 0), (100 << 20, 1 << 20), (100 << 20, 3 * PART_BYTES), (12 << 20, 1 << 20)]
)
def test_a_connection_that_breaks_during_a_write_leaves_nothing(
    s3: S3Server, bucket: str, size: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the server can be reached again when the stream is closed; and nothing has to be taken back."""
    way, discard = BrokenWay(s3.port, after_bytes=after), object_storage._discard

    def mended(files: Any, stream: Any, name: str) -> None:
        way.mend()
        discard(None, stream, name)

    monkeypatch.setattr(object_storage, "_discard", mended)
    storage = open_storage(s3.uri(bucket, port=way.port))
    with pytest.raises(SnapshotError, match=rf"cannot write {size:,} bytes to .*/runs/d/f: .*endpoint"):
        storage.write("d/f", [bytes(size // 2)] * 2)
    way.mend()  # a write of few parts fails only when it is closed
    assert s3.names(bucket) == []
    assert storage.write("d/f", [b"again"]) == 5
    assert storage.read("d/f") == b"again"
    way.close()


def test_a_server_that_dies_during_a_write_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with s3_server(tmp_path / "log") as dying:
        dying.make_bucket("bucket")
        storage = open_storage(dying.uri("bucket"), Throttle(1e9, _Interrupting(dying.process.kill)))
        with pytest.raises(SnapshotError, match="the endpoint does not answer; see whether it runs"):
            storage.write("d/f", [bytes(PART_BYTES)] * 6)


@pytest.mark.parametrize("size", [PART_BYTES, 3 * PART_BYTES])
def test_an_interrupted_write_leaves_nothing(s3: S3Server, bucket: str, size: int) -> None:
    storage = open_storage(s3.uri(bucket), Throttle(1e9, _Interrupting(_interrupt)))
    with pytest.raises(KeyboardInterrupt):
        storage.write("d/f", [bytes(size), b"rest"])
    assert s3.names(bucket) == []


def test_an_interrupted_write_of_a_file_system_leaves_the_old_file(tmp_path: Path) -> None:
    RenamingStorage(LocalFileSystem(), str(tmp_path)).write("d/f", [b"old"])
    storage = RenamingStorage(LocalFileSystem(), str(tmp_path), Throttle(1e9, _Interrupting(_interrupt)))
    with pytest.raises(KeyboardInterrupt):
        storage.write("d/f", [b"new", b"er"])
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["f"]
    assert storage.read("d/f") == b"old"


def test_orphans_of_a_file_system_are_invisible_and_swept(tmp_path: Path) -> None:
    storage = RenamingStorage(LocalFileSystem(), str(tmp_path))
    storage.write("step/f", [b"x"])
    (tmp_path / "step/g.tmp-0123456789ab").write_bytes(b"half")
    (tmp_path / "old.tmp-0123456789ab/deep").mkdir(parents=True)
    (tmp_path / "old.tmp-0123456789ab/deep/f.tmp-0123456789ab").write_bytes(b"half")
    assert list(storage.list("")) == ["step"] and list(storage.list("step")) == ["f"]
    assert list(storage.sweep()) == ["old.tmp-0123456789ab", "step/g.tmp-0123456789ab"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["f", "step"]


def test_only_a_few_parts_are_in_memory_at_a_time() -> None:
    """Parts between two flushes: what a stream may hold at most."""

    class Stream:
        def __init__(self) -> None:
            self.held = self.most = self.sent = 0

        def write(self, part: memoryview) -> None:
            self.held += part.nbytes
            self.most = max(self.most, self.held)

        def flush(self) -> None:
            self.sent, self.held = self.sent + self.held, 0

        close = flush

    class Files:
        def open_output_stream(self, name: str, compression: object) -> Stream:
            return stream

    stream = Stream()
    ObjectStorage(Files(), "bucket").write("f", [bytes(20 * PART_BYTES + 5)])
    assert (stream.sent, stream.most) == (20 * PART_BYTES + 5, 4 * PART_BYTES)


# -- directories, which are none --------------------------------------------------------------------------------------


def _checkpoint(storage: Storage, step: int) -> None:
    receipts: dict[int, Mapping[str, Any]] = {
        rank: checkpoint.write_rank(
            storage, checkpoint.directory(step), rank, data=[b"data %d" % rank], manifest=b"manifest"
        )
        for rank in range(2)
    }
    checkpoint.commit(storage, step, receipts=receipts, config_digest="cfg")


def _whole(storage: Storage) -> list[int]:
    """Steps that a reader would use, read as it would."""
    good, _ = checkpoint.list_checkpoints(storage)
    for found in good:
        for rank in range(2):
            assert checkpoint.read_rank(storage, checkpoint.directory(found.step), rank) == (
                b"manifest",
                b"data %d" % rank,
            )
    return [found.step for found in good]


def _every_death(s3: S3Server, bucket: str) -> Iterator[tuple[Storage, Storage, _Dying]]:
    """A storage with one checkpoint, of a writer that dies one change later each time; and a reader's."""
    for moment in range(60):
        root = f"{bucket}/{uuid.uuid4().hex}"
        reader = ObjectStorage(s3.files(), root)
        _checkpoint(reader, 1)
        files = _Dying(s3.files(), moment)
        yield ObjectStorage(files, root), reader, files
        if files.left >= 0:
            assert moment > 1, "somebody must have died"
            return
    raise AssertionError("never finished")


def test_a_quarantine_holds_or_did_not_happen_whichever_request_is_the_last(s3: S3Server, bucket: str) -> None:
    for writer, reader, files in _every_death(s3, bucket):
        with contextlib.suppress(SnapshotError):
            checkpoint.quarantine(writer, 1, "bad")
        assert _whole(reader) == ([1] if reader.exists("step-00000001/commit.json") else [])
        names = set(reader.list("rejected-step-00000001"))
        assert _whole(reader) or names >= {"commit.json", "rank00000.bin", "rank00001.bin"}, "nothing is lost"
        if files.left >= 0:
            assert (_whole(reader), "reason.txt" in names, reader.exists("step-00000001")) == ([], True, False)


def test_the_record_is_where_all_files_are_whichever_request_of_a_renaming_is_the_last(
    s3: S3Server, bucket: str
) -> None:
    for writer, reader, files in _every_death(s3, bucket):
        want = set(reader.list("step-00000001"))
        with contextlib.suppress(SnapshotError):
            writer.rename("step-00000001", "new")
        found = [set(reader.list(name)) for name in ("step-00000001", "new")]
        assert all(names == want for names in found if checkpoint.COMMIT_FILE in names)
        assert want in found, "nothing is lost"
        assert files.left < 0 or found == [set(), want]


def test_a_deletion_takes_the_record_first(s3: S3Server, bucket: str) -> None:
    for writer, reader, files in _every_death(s3, bucket):
        with contextlib.suppress(SnapshotError):
            writer.delete("step-00000001")
        good, rejected = checkpoint.list_checkpoints(reader)
        assert rejected == (), "half of it is no checkpoint, not a damaged one"
        assert len(good) == (files.left < 0 and reader.exists("step-00000001/commit.json"))


def test_an_object_too_large_for_the_server_to_copy_is_copied_by_hand(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, content = _Counting(s3.files()), bytes(range(256)) * 90_000
    storage = ObjectStorage(files, f"{bucket}/runs")
    storage.write("old/f", [content])
    storage.write("old/small", [b"s"])
    monkeypatch.setattr(object_storage, "_LARGEST_COPY", 1000)
    storage.rename("old", "new")
    assert storage.read("new/f") == content and storage.read("new/small") == b"s"
    assert s3.names(bucket) == [f"{bucket}/runs/new/f", f"{bucket}/runs/new/small"]
    assert files.copied == [f"{bucket}/runs/old/small"]


class _Counting:
    """Notes what the server is asked to copy."""

    def __init__(self, files: Any) -> None:
        self._files, self.copied = files, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def copy_file(self, source: str, target: str) -> None:
        self.copied.append(source)
        self._files.copy_file(source, target)


def test_the_same_calls_leave_the_same_files_in_a_directory_and_in_a_bucket(tmp_path: Path, s3_uri: str) -> None:
    listed = []
    for storage in (DirectoryStorage(tmp_path), open_storage(s3_uri)):
        for step in (1, 2, 3):
            _checkpoint(storage, step)
        checkpoint.quarantine(storage, 3, "bad")
        checkpoint.retain(storage, 1)
        listed.append({name: list(storage.list(name)) for name in storage.list("") if name != "LATEST"})
    assert listed[0] == listed[1]
    assert set(listed[0]) == {"step-00000002", "rejected-step-00000003"}


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named_and_is_not_an_empty_one(s3: S3Server, bucket: str) -> None:
    storage = open_storage(s3.uri("nobody-has-this"))
    with pytest.raises(SnapshotError, match=r"cannot write 1 bytes to nobody-has-this/runs/f: there is no such bucket"):
        storage.write("f", [b"x"])
    with pytest.raises(SnapshotError, match=r"cannot list nobody-has-this/runs: there is no such bucket; create it"):
        storage.list("")


def test_wrong_credentials_are_told_from_missing_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path / "log", INITIAL_NO_AUTH_ACTION_COUNT="2") as strict:
        strict.make_bucket("bucket")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        storage = open_storage(strict.uri("bucket"))
        for act in (lambda: storage.write("f", [b"x"]), lambda: storage.list("")):
            with pytest.raises(SnapshotError, match="the credentials are wrong or have expired; renew"):
                act()
        with pytest.raises(SnapshotError, match=r"cannot look for bucket/runs/f: access is denied; set credentials"):
            storage.exists("f")


def test_an_endpoint_that_nobody_serves_is_told_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    storage = open_storage(f"s3://b/p?region=r&scheme=http&endpoint_override=127.0.0.1:{port}")
    with pytest.raises(SnapshotError, match="the endpoint does not answer"):
        storage.read("f")


def test_an_endpoint_that_accepts_and_says_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(object_storage, "_ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        storage = open_storage(f"s3://b/p?region=r&scheme=http&endpoint_override=127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SnapshotError, match="the endpoint does not answer"):
            storage.list("")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject", "in another region; set region="),
        ("AWS Error NETWORK_CONNECTION: curlCode: 6, Could not resolve hostname", "host of the endpoint is not known"),
        ("google::cloud::Status(UNAUTHENTICATED: Could not create credentials)", "there are no credentials"),
        ("Unable to load libhdfs: libhdfs.so", "HDFS needs Java"),
        ("something new", "cannot read b/f: something new"),
    ],
)
def test_each_kind_of_trouble_has_its_own_words(text: str, said: str) -> None:
    class Files:
        def open_input_file(self, name: str) -> None:
            raise OSError(text)

    with pytest.raises(SnapshotError) as refused:
        ObjectStorage(Files(), "b").read("f")
    assert said in str(refused.value) and text in str(refused.value)


def test_hdfs_without_its_library_says_what_it_needs() -> None:
    with pytest.raises(SnapshotError, match=r"cannot open hdfs://nowhere:1/p: HDFS needs Java and Hadoop"):
        open_storage("hdfs://nowhere:1/p")
