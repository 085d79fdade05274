"""What a run is called and which configurations belong to it."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from holdfast import __version__
from holdfast.configs.options import enum_of, kinds
from holdfast.configs.plain import from_plain, to_plain
from holdfast.configs.schema import RunConfig
from holdfast.launch import identity
from holdfast.launch.identity import FREE_KEYS, config_digest, git_commit, new_run_id, versions

# -- the digest -------------------------------------------------------------------------------------------------------


def _set(plain: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {**plain, head: _set(plain[head], rest, value) if rest else value}


def _get(plain: dict[str, Any], key: str) -> Any:
    head, _, rest = key.partition(".")
    return _get(plain[head], rest) if rest else plain[head]


def _other(key: str, value: object) -> object:
    """A value of the same kind that differs."""
    members = enum_of(key)
    if members is not None:
        return next((m.name for m in members if m.name != value), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, value[0] if value else "x"] if isinstance(value, list) else f"{value}x"


def _is_free(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: n + 1]) in FREE_KEYS for n in range(len(parts)))


@pytest.mark.parametrize("key", kinds())
def test_a_changed_option_changes_the_digest_unless_it_is_declared_free(key: str) -> None:
    plain = to_plain(RunConfig())
    other = _other(key, _get(plain, key))
    if other is None:
        pytest.skip("an enum of one member")
    assert (config_digest(_set(plain, key, other)) == config_digest(plain)) == _is_free(key)


def test_every_free_key_exists_and_has_a_reason() -> None:
    options = set(kinds()) | {key.partition(".")[0] for key in kinds()}
    assert set(FREE_KEYS) <= options
    assert all(FREE_KEYS.values())


def test_the_free_keys_are_pinned() -> None:
    """One more lets a run go on as something else than it was; one less strands the runs that rely on it."""
    assert set(FREE_KEYS) == {
        *("project", "root", "run_id", "resume", "launch", "recovery", "snapshot", "tracker", "chaos"),
        *("trainer.max_steps", "trainer.log_every", "trainer.eval_every", "trainer.eval_windows"),
        *("trainer.generate_bytes", "trainer.prompt", "data.cache", "model.name", "parallel.collective_timeout_s"),
        *("trainer.micro_batch", "parallel.zero_stage", "trainer.nonfinite", "trainer.max_nonfinite"),
        *("parallel.pipeline", "parallel.schedule", "parallel.chunks", "parallel.blocks"),
        *("adapter.base", "adapter.tasks", "adapter.seen", "adapter.domains", "adapter.rounds", "adapter.least_gain"),
        *("adapter.directions", "adapter.protected_directions", "adapter.router_prompts", "adapter.in_memory"),
        *("model.path", "data.tokenizer", "data.split"),
    }


def test_the_digest_is_of_the_sorted_options_wherever_they_came_from() -> None:
    plain = to_plain(RunConfig())
    assert config_digest(to_plain(from_plain(plain))) == config_digest(plain)
    assert re.fullmatch("[0-9a-f]{32}", config_digest(plain))
    written = b'{"a": 1, "b.c": [1, 2.5], "b.d": null}'
    assert config_digest({"b": {"d": None, "c": [1, 2.5]}, "a": 1}) == hashlib.sha256(written).hexdigest()[:32]


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_name_tells_when_and_can_be_said_aloud() -> None:
    moment = datetime(2026, 11, 23, 23, 12, 4, tzinfo=timezone.utc)
    assert re.fullmatch(r"20261123-231204-[a-z]+-[a-z]+-[0-9a-f]{4}", new_run_id(moment))


def test_names_are_in_universal_time_and_sort_by_it() -> None:
    moment = datetime(2026, 11, 23, 23, 59, 59, tzinfo=timezone.utc)
    later = (moment + timedelta(seconds=1)).astimezone(timezone(timedelta(hours=-7)))
    assert new_run_id(later).startswith("20261124-000000-")
    assert new_run_id(moment) < new_run_id(later)


def test_runs_of_the_same_second_and_seed_have_different_names() -> None:
    moment = datetime(2026, 11, 23, tzinfo=timezone.utc)
    names = set()
    for _ in range(200):
        random.seed(1)
        names.add(new_run_id(moment))
    assert len(names) == 200


def test_a_name_can_be_reproduced_for_a_record() -> None:
    moment = datetime(2026, 11, 23, tzinfo=timezone.utc)
    assert new_run_id(moment, random.Random(3)) == new_run_id(moment, random.Random(3))


def test_every_name_is_a_name_of_a_run_directory() -> None:
    for words in (identity._ADJECTIVES, identity._NOUNS):
        assert len(words) == len(set(words)) > 60
        assert all(re.fullmatch("[a-z]+", word) for word in words)


# -- what it is made of -----------------------------------------------------------------------------------------------


def test_versions_are_those_that_are_installed() -> None:
    found = versions()
    assert found["holdfast"] == __version__
    assert found["torch"] == metadata.version("torch")
    assert found["python"].count(".") == 2


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        if package == "ray":
            raise metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", missing)
    assert "ray" not in versions()
    assert versions()["numpy"] == "1.2.3"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh repository that no setting of this machine reaches."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    made = tmp_path / "repository"
    made.mkdir()
    _git(made, "init", "-q")
    return made


def _git(directory: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _commit(directory: Path) -> str:
    (directory / "file").write_text("one")
    _git(directory, "add", "file")
    _git(directory, "commit", "-q", "-m", "first")
    return _git(directory, "rev-parse", "HEAD")


def test_the_commit_of_the_working_tree_is_found_from_below(repository: Path) -> None:
    commit = _commit(repository)
    (repository / "below").mkdir()
    assert git_commit(repository / "below") == commit


def test_a_changed_file_and_a_tag_show_or_do_not_show(repository: Path) -> None:
    commit = _commit(repository)
    _git(repository, "tag", "v1")
    _git(repository, "tag", "-a", "v2", "-m", "annotated")
    (repository / "untracked").touch()
    assert git_commit(repository) == commit
    (repository / "file").write_text("two")
    assert git_commit(repository) == f"{commit}-dirty"


def test_without_a_repository_a_commit_or_a_directory_there_is_none(repository: Path) -> None:
    assert git_commit(repository) is None
    assert git_commit(repository.parent) is None
    assert git_commit(repository / "nowhere") is None


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 5.0)])
def test_a_machine_without_git_or_with_a_slow_one_has_no_commit(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert git_commit(tmp_path) is None
