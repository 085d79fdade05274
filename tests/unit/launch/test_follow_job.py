"""Watching a job whose stream breaks, whose server goes away, and whose user presses Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch import follow_job as module
from holdfast.launch.follow_job import exit_code_in, follow_job


@dataclass
class State:
    status: str
    exit_code: int | None = None
    message: str = ""

    @property
    def is_over(self) -> bool:
        return self.status != "RUNNING"


@dataclass
class Server:
    """Answers with a script: a state, an error, or KeyboardInterrupt as if the user had pressed Ctrl-C just then."""

    script: list[object]
    whole: str = ""
    streams: list[list[str]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def state(self, submission_id: str) -> State:
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, State):
            return answer
        assert isinstance(answer, BaseException)
        raise answer

    def log(self, submission_id: str) -> str:
        return self.whole

    def follow(self, submission_id: str, say: Callable[[str], None]) -> None:
        for text in self.streams.pop(0) if self.streams else []:
            say(text)

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REATTACH_S", 0.001)


_RUNNING, _DONE = State("RUNNING"), State("SUCCEEDED", 0)


def test_a_stream_that_ends_early_is_taken_up_again_and_every_line_is_shown_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [f"line {n}\n" for n in range(9)]
    streams = [lines[:3], lines[:5], [], ["".join(lines[:4]), "".join(lines[4:7])]]
    server = Server([_RUNNING] * 20 + [_DONE], whole="".join(lines), streams=streams)
    watched = follow_job(server, "j", poll_s=0.005)
    assert watched.state == _DONE
    assert capsys.readouterr().out == "".join(lines)


def test_an_ended_stream_is_no_sign_of_an_ended_job() -> None:
    server = Server([_RUNNING] * 5 + [State("FAILED", 93)], whole="END   failed (exit code 93): x\n")
    watched = follow_job(server, "j", poll_s=0.001)
    assert watched.state is not None and watched.state.exit_code == 93
    assert exit_code_in(watched.said) == 93


def test_a_server_that_goes_away_is_asked_again_and_given_up_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    gone = ConnectionError("refused")
    back = follow_job(Server([gone, gone, _RUNNING, gone, _DONE]), "j", poll_s=0.001)
    assert back.state == _DONE
    assert capsys.readouterr().err.count("does not answer") == 2, "once for each time it goes away"
    away = follow_job(Server([gone]), "j", poll_s=0.001, patience_s=0.02)
    assert away.state is None and "0.02 s" in away.why


def test_a_job_that_the_server_no_longer_knows_is_not_one_that_never_was() -> None:
    unknown = ConfigurationError("Job j does not exist")
    watched = follow_job(Server([_RUNNING, ConnectionError("refused"), unknown]), "j", poll_s=0.001)
    assert watched.state is None and watched.is_forgotten
    with pytest.raises(ConfigurationError, match="does not exist"):
        follow_job(Server([unknown]), "j", poll_s=0.001)


def test_the_first_ctrl_c_stops_the_job_and_waits_the_second_leaves_it_alone() -> None:
    stopped = Server([_RUNNING, KeyboardInterrupt(), _RUNNING, State("STOPPED")])
    watched = follow_job(stopped, "j", poll_s=0.001)
    assert stopped.stopped == ["j"]
    assert watched.state == State("STOPPED")
    left = Server([KeyboardInterrupt(), _RUNNING, KeyboardInterrupt(), _RUNNING])
    watched = follow_job(left, "j", poll_s=0.001)
    assert left.stopped == ["j"], "not told twice"
    assert watched.state is None and "second Ctrl-C" in watched.why


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ("", None),
        ("step 1\nEND   stopped (exit code 75): x\n      saved y\n", 75),
        ("END   failed (exit code 1): a\nEND   stopped (exit code 75): b\n", 75),
        ("TEXT  END   stopped (exit code 3)\n", None),
    ],
)
def test_the_last_word_of_a_driver_names_its_exit_code(log: str, code: int | None) -> None:
    assert exit_code_in(log) == code
