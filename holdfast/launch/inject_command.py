"""``holdfast inject``: breaks something in a run that is going on, and says what became of it. Loads no torch."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.chaos import ACTIONS, parse
from holdfast.launch import inject_files, lease
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.inject_files import Answer, State
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import clean

__all__ = ["inject"]

_NOT_STRUCK = 1
_POLL_S = 0.1


def inject(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code: 0 when everything has struck or, with ``--no-wait``, was
    asked for. Raises: ConfigurationError for what cannot be asked for or is refused."""
    args = _parser().parse_intermixed_args(list(words))
    if args.list:
        sys.stdout.write("".join(f"{line}\n" for line in _listed()))
        return 0
    entries = _entries(args.words)
    if args.run is None or not entries:
        raise ConfigurationError("give a RUN and an ENTRY, for example: holdfast inject RUN sigkill rank=1")
    _refuse_bad(entries)
    run = find_run(args.run, args.root)
    _refuse_idle(run)
    by = f"{getpass.getuser()}, pid {os.getpid()} on {socket.gethostname()}"
    asked = {inject_files.ask(run.path, entry, by): entry for entry in entries}
    if args.no_wait:
        sys.stdout.write("".join(f"{number:03d} asked for: {entry}\n" for number, entry in asked.items()))
        return 0
    return _wait(run, asked)


# -- the command line -------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast inject",
        allow_abbrev=False,
        description="Injects faults into a run that is going on and waits until they have struck. An ENTRY is "
        "ACTION KEY=VALUE ..., as in chaos.faults; without step= it strikes at the next step.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run")
    parser.add_argument("words", nargs="*", metavar="ENTRY", help="for example sigkill rank=1")
    parser.add_argument("--list", action="store_true", help="show every action with its keys, and nothing else")
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait for the driver's answer")
    add_root(parser)
    return parser


def _listed() -> Iterator[str]:
    for action, kind in ACTIONS.items():
        yield f"{action.value}: {kind.does}"
        keys = [f"{key}={'|'.join(kind.what) if key == 'what' else ''}" for key in (*kind.single_keys, *kind.takes)]
        yield "    " + " ".join(f"[{key}]" if key.partition("=")[0] in kind.optional_keys else key for key in keys)
    yield ""
    yield "at= is a failpoint; step= counts finished steps. Instead of rank= or node= and step=, any action takes"
    yield "rate=P seed=K [ranks=0-2 | nodes=0-2] [from=S] [to=S]: probability P per rank or node and step."


def _entries(words: Sequence[str]) -> list[str]:
    """A word without ``=`` begins another entry, whether or not the shell was given quotes."""
    entries: list[str] = []
    for word in " ".join(words).split():
        if entries and "=" in word:
            entries[-1] += f" {word}"
        else:
            entries.append(word)
    return entries


# -- the run ----------------------------------------------------------------------------------------------------------


def _refuse_bad(entries: Sequence[str]) -> None:
    problems: list[str] = []
    for entry in entries:
        try:
            parse(entry, any_step=True)
        except ConfigurationError as error:
            problems += error.problems
    if problems:
        raise ConfigurationError(problems)


def _is_driven(run: RunDir) -> bool:
    return lease.holder(run.path / "driver.lock") is not None


def _refuse_idle(run: RunDir) -> None:
    if not _is_driven(run):
        raise ConfigurationError(
            f"run {run.run_id} is not being driven, so nothing can strike; start it, or put the entry into "
            "chaos.faults of its next attempt"
        )


def _wait(run: RunDir, asked: Mapping[int, str]) -> int:
    """Until the driver has said the last word on each."""
    left, found = dict(asked), dict[int, Answer]()
    while left:
        is_driven = _is_driven(run)  # first: an answer that is given before the end is read after it
        for number in list(left):
            answer = inject_files.answer_to(run.path, number)
            if answer is not None and (answer.is_final or not is_driven):
                found[number] = answer
                sys.stdout.write(f"{_told(left.pop(number), answer)}\n")
            elif not is_driven:
                found[number] = Answer(State.MISSED, "the run has ended without an answer")
                sys.stdout.write(f"{_told(left.pop(number), found[number])}\n")
        sys.stdout.flush()
        time.sleep(_POLL_S if left else 0.0)
    refused = [f"{asked[n]}: {a.detail}" for n, a in found.items() if a.state is State.REFUSED]
    if refused:
        raise ConfigurationError(refused)
    return 0 if all(answer.state is State.STRUCK for answer in found.values()) else _NOT_STRUCK


def _told(entry: str, answer: Answer) -> str:
    step = f" at step {answer.step}" if answer.state is State.STRUCK else ""
    why = f": {clean(answer.detail)}" if answer.detail else ""
    return f"{answer.state.value}{step}  {entry}{why}"
