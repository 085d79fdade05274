"""``holdfast inject``: what is asked for, how the answer is told, and what is refused before anybody is asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.chaos import Action
from holdfast.launch import inject_files
from holdfast.launch.inject_command import inject
from holdfast.launch.inject_files import Answer, State
from holdfast.launch.run_dir import RunDir
from tests.support.drivers import until


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(str(tmp_path), "p", "r1", config_digest="d")


@contextmanager
def driven(run: RunDir, *answers: Answer) -> Iterator[None]:
    """Somebody holds the lease and gives these answers, one per wish, until the block is left."""
    gone = threading.Event()

    def answer() -> None:
        while not gone.wait(0.01):
            for wish in inject_files.wishes(run.path, 0):
                if wish.number <= len(answers):
                    inject_files.answer(run.path, wish.number, answers[wish.number - 1])

    with run.lock():
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            gone.set()
            thread.join()


def problems_of(*words: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        inject(words)
    return "\n".join(caught.value.problems)


def test_every_action_is_listed_with_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert inject(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.partition(":")[0] for line in listed.split("\n\n")[0].splitlines()[::2]] == [a.value for a in Action]
    assert "slow_link: bulk data at this rate for so long\n    [node=] step= mb_per_s= for=\n" in listed
    assert "[what=data|manifest|parity]" in listed


@pytest.mark.parametrize(
    "words", [["sigkill", "rank=1", "exit", "rank=0", "step=9"], ["sigkill rank=1", "exit rank=0 step=9"]]
)
def test_entries_are_told_apart_with_and_without_quotes(
    words: list[str], run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with driven(run, Answer(State.STRUCK, step=4), Answer(State.STRUCK, step=9)):
        assert inject([str(run.path), *words]) == 0
    assert [wish.entry for wish in inject_files.wishes(run.path, 0)] == ["sigkill rank=1", "exit rank=0 step=9"]
    assert capsys.readouterr().out == "struck at step 4  sigkill rank=1\nstruck at step 9  exit rank=0 step=9\n"


def test_a_run_is_found_by_its_id(run: RunDir, tmp_path: Path) -> None:
    with driven(run, Answer(State.STRUCK, step=4)):
        assert inject(["r1", "sigkill", "rank=1", "--root", str(tmp_path)]) == 0
    assert "the newest there are r1" in problems_of("r2", "sigkill rank=1", "--root", str(tmp_path))


def test_what_did_not_strike_is_an_exit_code_and_what_was_refused_an_error(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with driven(run, Answer(State.MISSED, "the run has ended"), Answer(State.REFUSED, "rank=9 does not exist")):
        assert inject([str(run.path), "sigkill rank=1"]) == 1
        assert problems_of(str(run.path), "sigkill rank=9") == "sigkill rank=9: rank=9 does not exist"
    assert "missed  sigkill rank=1: the run has ended" in capsys.readouterr().out


def test_nobody_waits_for_a_driver_that_has_died(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    is_driven = threading.Event()

    def drive() -> None:
        with driven(run, Answer(State.ACCEPTED)):
            is_driven.set()
            until(lambda: inject_files.answer_to(run.path, 1), "an answer")

    thread = threading.Thread(target=drive)
    thread.start()
    assert is_driven.wait(10)
    assert inject([str(run.path), "sigkill rank=1"]) == 1
    thread.join()
    assert capsys.readouterr().out.startswith("accepted  sigkill rank=1")


def test_asking_without_waiting_returns_at_once(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with driven(run):
        assert inject([str(run.path), "--no-wait", "driver_sigterm"]) == 0
    assert capsys.readouterr().out == "001 asked for: driver_sigterm\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "give a RUN and an ENTRY"),
        (["{run}"], "give a RUN and an ENTRY"),
        (["{run}", "sigkil", "rank=1", "exit"], "did you mean 'sigkill'?"),
        (["{run}", "sigkil", "rank=1", "exit"], "chaos fault 'exit': rank= is missing"),
        (["{run}", "sigkill", "rank=1"], "run r1 is not being driven"),
        (["{run}", "sigkill", "rank=1", "--wibble"], "unrecognized arguments: --wibble"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(words: list[str], wanted: str, run: RunDir) -> None:
    assert wanted in problems_of(*(word.replace("{run}", str(run.path)) for word in words))
    assert not (run.path / "inject").exists()
