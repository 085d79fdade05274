"""Which run a command line means: by directory, by id, the newest, and what is said when it is none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch.find_run import find_run
from holdfast.launch.run_dir import RunDir


def _made(root: Path, run_id: str, created: float = 1.0, project: str = "p") -> RunDir:
    return RunDir.create(str(root), project, run_id, config_digest="d", clock=lambda: created)


def test_a_directory_is_a_run_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _made(tmp_path / "elsewhere", "mine")
    monkeypatch.setenv("HOLDFAST_HOME", "/nowhere")
    (tmp_path / "link").symlink_to(run.path)
    monkeypatch.chdir(run.path)
    for name in (str(run.path), f"{run.path}/", ".", "../mine", str(tmp_path / "link"), str(run.path / "logs" / "..")):
        found = find_run(name, None)
        assert (found.path, found.run_id) == (run.path, "mine"), name


def test_an_id_is_looked_for_in_every_project_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for project, run_id in (("a", "one"), ("b", "two")):
        _made(tmp_path, run_id, project=project)
    monkeypatch.setenv("HOLDFAST_HOME", "/nowhere")
    assert find_run("two", str(tmp_path)).path == tmp_path / "b" / "two"
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    assert find_run("one", None).path == tmp_path / "a" / "one"
    monkeypatch.chdir(tmp_path.parent)
    assert find_run("one", tmp_path.name).path == tmp_path / "a" / "one"


def test_without_a_name_the_run_that_was_begun_last_is_meant(tmp_path: Path) -> None:
    """Not the one whose record was written last, which is rewritten by every attempt."""
    old = _made(tmp_path, "b", created=1.0)
    for created, run_id, project in ((3.0, "a", "q"), (2.0, "c", "p")):
        _made(tmp_path, run_id, created, project)
    old.begin_attempt(config={}, overrides=(), command=())
    _made(tmp_path, "damaged", 9.0).path.joinpath("run.json").write_bytes(b"{")
    assert find_run(None, str(tmp_path)).run_id == "a"


def test_an_unknown_name_is_refused_with_the_newest_runs(tmp_path: Path) -> None:
    for number in range(7):
        _made(tmp_path, f"run{number}", created=float(number))
    with pytest.raises(ConfigurationError) as refused:
        find_run("run", str(tmp_path))
    told = f"run 'run' is neither the directory of a run nor an id below {tmp_path}; the newest there are "
    assert refused.value.problems == (told + "run6, run5, run4, run3, run2",)


@pytest.mark.parametrize(
    ("name", "wanted"), [(None, "no run was found"), ("x", "run 'x' is neither the directory of a run nor an id")]
)
def test_where_there_is_no_run_the_way_to_another_place_is_told(name: str | None, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        find_run(name, str(tmp_path))
    assert refused.value.problems == (f"{wanted} below {tmp_path}: there is none; --root names another place",)


def test_an_id_of_two_runs_is_refused_with_both(tmp_path: Path) -> None:
    for created, project in enumerate("ab"):
        _made(tmp_path, "same", float(created), project)
    with pytest.raises(ConfigurationError) as refused:
        find_run("same", str(tmp_path))
    assert refused.value.problems == (
        f"run same exists in several projects; give one: {tmp_path}/b/same, {tmp_path}/a/same",
    )


def test_a_record_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    run = _made(tmp_path, "mine")
    (run.path / "run.json").write_bytes(b"{")
    for name in ("mine", str(run.path)):
        with pytest.raises(ConfigurationError, match=r"run\.json cannot be read"):
            find_run(name, str(tmp_path))
