"""One contract for every storage, then what only a directory can get wrong."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from holdfast.errors import ConfigurationError, InvariantViolation, SnapshotError
from holdfast.fault_tolerance.object_storage import RenamingStorage
from holdfast.fault_tolerance.storage import DirectoryStorage, MemoryStorage, Storage, open_storage


@pytest.fixture(params=["directory", "memory", "s3", "renaming"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """HDFS has a rename as file systems have; pyarrow's own local one, of the same interface, stands for it."""
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3_uri"))
    return {
        "directory": DirectoryStorage(tmp_path / "root"),
        "memory": MemoryStorage(),
        "renaming": RenamingStorage(LocalFileSystem(), str(tmp_path / "root")),
    }[request.param]


# -- the contract -----------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(storage: Storage) -> None:
    pieces = [b"abc", bytearray(b"de"), memoryview(b"xxfxx")[2:3], np.arange(3, dtype=np.int32), np.zeros((0, 4))]
    want = b"abcdef" + np.arange(3, dtype=np.int32).tobytes()
    assert storage.write("a/b/c.bin", pieces) == len(want)
    assert storage.read("a/b/c.bin") == want
    assert storage.size("a/b/c.bin") == len(want)
    assert storage.exists("a/b/c.bin") and storage.exists("a/b") and storage.exists("a")


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    assert storage.write("empty", []) == 0
    assert storage.exists("empty") and storage.read("empty") == b"" and storage.size("empty") == 0


def test_a_second_write_replaces_the_first_whole(storage: Storage) -> None:
    storage.write("f", [b"long long long"])
    storage.write("f", [b"short"])
    assert storage.read("f") == b"short"


def test_later_changes_to_a_buffer_do_not_reach_the_file(storage: Storage) -> None:
    buffer = bytearray(b"before")
    storage.write("f", [buffer])
    buffer[:] = b"after!"
    assert storage.read("f") == b"before"


def test_a_part_of_a_file_is_read_as_a_slice_of_the_whole(storage: Storage) -> None:
    content = bytes(range(256)) * 40
    storage.write("d/f", [content])
    for start, stop in ((0, 0), (0, 1), (17, 5000), (len(content) - 3, len(content)), (0, len(content))):
        assert storage.read_range("d/f", start, stop) == content[start:stop]
    with pytest.raises(SnapshotError, match="cannot read bytes 10,000 to 10,300 of d/f: it ends 60 earlier"):
        storage.read_range("d/f", 10_000, 10_300)
    with pytest.raises(SnapshotError, match="d/gone"):
        storage.read_range("d/gone", 0, 1)


def test_a_file_of_many_parts_is_one_file(storage: Storage) -> None:
    content = np.random.default_rng(5).integers(0, 256, 45_000_000, dtype=np.uint8).tobytes()
    assert storage.write("f", [content[:100], content[100:37_000_000], content[37_000_000:]]) == len(content)
    assert storage.size("f") == len(content)
    assert storage.read("f") == content


def test_names_are_listed_in_order_and_one_level_deep(storage: Storage) -> None:
    for path in ("b/2", "b/1", "b/deep/3", "a", "bb/4"):
        storage.write(path, [b"x"])
    assert list(storage.list("")) == ["a", "b", "bb"]
    assert list(storage.list("b")) == ["1", "2", "deep"]
    assert list(storage.list("nothing")) == []


def test_a_missing_file_is_an_error_that_names_it(storage: Storage) -> None:
    for method in (storage.read, storage.size):
        with pytest.raises(SnapshotError, match="step-1/gone"):
            method("step-1/gone")
    assert not storage.exists("step-1/gone")


def test_a_directory_is_not_a_file_and_a_file_is_not_a_directory(storage: Storage) -> None:
    storage.write("d/f", [b"x"])
    for method in (storage.read, storage.size):
        with pytest.raises(SnapshotError, match="d"):
            method("d")
    with pytest.raises(SnapshotError, match="list"):
        storage.list("d/f")


def test_a_directory_is_renamed_with_all_in_it(storage: Storage) -> None:
    storage.write("old/x/f", [b"1"])
    storage.write("older/f", [b"2"])
    storage.rename("old", "new")
    assert storage.read("new/x/f") == b"1"
    assert list(storage.list("")) == ["new", "older"]


def test_a_rename_never_replaces_anything(storage: Storage) -> None:
    storage.write("old/f", [b"1"])
    storage.write("new/f", [b"2"])
    with pytest.raises(SnapshotError, match="exists already"):
        storage.rename("old", "new")
    assert (storage.read("old/f"), storage.read("new/f")) == (b"1", b"2")
    with pytest.raises(SnapshotError, match="rename"):
        storage.rename("nothing", "other")


def test_deleting_takes_one_directory_and_can_be_repeated(storage: Storage) -> None:
    for path in ("d/e/f", "d/g", "dd/f"):
        storage.write(path, [b"x"])
    storage.delete("d")
    storage.delete("d")
    assert list(storage.list("")) == ["dd"]
    assert not storage.exists("d/g")
    storage.delete("dd/f")
    assert list(storage.list("dd")) == []


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../up", "a/../../up", "a.tmp-b"])
def test_a_path_outside_or_in_the_unfinished_names_is_a_bug(storage: Storage, path: str) -> None:
    with pytest.raises(InvariantViolation, match="relative"):
        storage.write(path, [b"x"])


def test_sweeping_finished_files_removes_nothing(storage: Storage) -> None:
    storage.write("d/f", [b"x"])
    assert list(storage.sweep()) == []
    assert storage.read("d/f") == b"x"


# -- directories ------------------------------------------------------------------------------------------------------


def every_file(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def test_a_file_gets_its_name_after_its_bytes_are_durable_and_the_name_is_made_durable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, calls = DirectoryStorage(tmp_path), list[str]()
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".tmp-")[0])
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        calls.append(f"rename {os.path.basename(target)}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    storage.write("new/deep/f", [b"x"])
    assert calls == [f"sync {tmp_path.name}", "sync new", "sync f", "rename f", "sync deep"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, real = DirectoryStorage(tmp_path), os.write
    storage.write("d/f", [b"the old content"])
    room = [1000]

    def write(descriptor: int, data: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= (written := real(descriptor, bytes(data[: room[0]])))
        return written

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(SnapshotError, match=rf"no space left for 1,500 bytes of {tmp_path}/d/f.*keep_last"):
        storage.write("d/f", [bytes(800), bytes(700)])
    assert every_file(tmp_path) == ["d", "d/f"]
    assert storage.read("d/f") == b"the old content"


def test_a_disk_that_is_full_only_at_fsync_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SnapshotError, match="no space left for 3 bytes"):
        DirectoryStorage(tmp_path).write("f", [b"abc"])
    assert every_file(tmp_path) == []


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel itself stops writes here, in the middle of a buffer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_cuts_short_is_no_file(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path)
    with file_size_limit(10_000), pytest.raises(SnapshotError, match=r"cannot write 50,000 bytes to .*File too large"):
        storage.write("f", [bytes(50_000)])
    assert every_file(tmp_path) == []
    assert storage.write("f", [bytes(50_000)]) == 50_000


def test_an_interrupt_between_two_buffers_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [0], os.write

    def write(descriptor: int, data: Any) -> int:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(KeyboardInterrupt):
        DirectoryStorage(tmp_path).write("f", [b"one", b"two"])
    assert every_file(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    storage = DirectoryStorage(tmp_path)
    storage.write("f", [b"0123456789", b"abc"])
    monkeypatch.undo()
    assert storage.read("f") == b"0123456789abc"


def test_what_cannot_be_listed_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(_: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(SnapshotError, match=r"cannot list .*Permission denied"):
        DirectoryStorage(tmp_path).list("")


def test_a_directory_disappears_before_its_first_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DirectoryStorage(tmp_path)
    for name in "abc":
        storage.write(f"d/{name}", [b"x"])
    seen, real = list[list[str]](), os.unlink

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        seen.append(list(storage.list("")))
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    storage.delete("d")
    assert seen == [[], [], []]
    assert every_file(tmp_path) == []


def test_orphans_are_invisible_and_swept(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path)
    storage.write("step/f", [b"x"])
    (tmp_path / "step/g.tmp-0123456789ab").write_bytes(b"half")
    (tmp_path / "old.tmp-0123456789ab/deep").mkdir(parents=True)
    (tmp_path / "old.tmp-0123456789ab/deep/f.tmp-0123456789ab").write_bytes(b"half")
    assert list(storage.list("")) == ["step"] and list(storage.list("step")) == ["f"]
    assert sorted(storage.sweep()) == ["old.tmp-0123456789ab", "step/g.tmp-0123456789ab"]
    assert every_file(tmp_path) == ["step", "step/f"]


def test_a_directory_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path / "later")
    assert list(storage.list("")) == [] and list(storage.sweep()) == [] and not storage.exists("f")


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "file://localhost{path}"])
def test_a_path_and_a_file_uri_name_the_same_place(tmp_path: Path, form: str) -> None:
    root = tmp_path / "with space"
    uri = form.format(path=root if form == "{path}" else str(root).replace(" ", "%20"))
    open_storage(uri).write("f", [b"x"])
    assert (root / "f").read_bytes() == b"x"


@pytest.mark.parametrize("uri", ["checkpoints", "./c", "ftp://bucket/c", "file://host/c", "file:c", ""])
def test_other_places_are_refused_with_the_way_out(uri: str) -> None:
    with pytest.raises(ConfigurationError, match=r"absolute path or a file:// URI, for example '/"):
        open_storage(uri)


def test_a_relative_root_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be absolute"):
        DirectoryStorage("here")
