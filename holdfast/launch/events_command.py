"""``holdfast events``: what has happened in a run, in the console's words. Loads neither torch nor Ray."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Collection, Iterator, Sequence

from holdfast.errors import ConfigurationError
from holdfast.events import kind_name, to_record
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.following import PATIENCE_S, views
from holdfast.launch.read_back import Unread, kinds
from holdfast.launch.run_state import DRIVER_GONE, exit_code_of
from holdfast.launch.run_view import RunReader, RunView, Timed
from holdfast.launch.run_words import clock, event_lines
from holdfast.launch.wording import clean

__all__ = ["events"]

_LOOK_S = 0.2


def events(words: Sequence[str]) -> int:
    """Print events for the command line ``words``; the exit code. Raises: ConfigurationError."""
    args = _parser().parse_args(list(words))
    chosen = _chosen(args.kind)
    run = find_run(args.run, args.root)
    show = _Shown(chosen, as_json=args.json)
    if not args.follow:
        show.new_in(RunReader(run, newest_steps=0).view())
        return 0
    for view in views(run, every_s=_LOOK_S, newest_steps=0):
        show.new_in(view)
    return 0 if exit_code_of(view) != DRIVER_GONE else DRIVER_GONE


def _chosen(names: Sequence[str] | None) -> Collection[str]:
    """Kinds to show; none means all."""
    chosen = [name for names_ in names or () for name in names_.split(",")]
    problems = [
        f"--kind={name} is no kind of event; choose from {', '.join(_like(name))}"
        for name in chosen
        if name not in kinds()
    ]
    if problems:
        raise ConfigurationError(problems)
    return chosen


def _like(name: str) -> Collection[str]:
    """Kinds that may have been meant, or all."""
    return [kind for kind in kinds() if name in kind] or difflib.get_close_matches(name, kinds()) or kinds()


class _Shown:
    """Prints each event once."""

    def __init__(self, kinds: Collection[str], *, as_json: bool) -> None:
        self._kinds, self._as_json = kinds, as_json
        self._told: list[Timed] = []

    def new_in(self, view: RunView) -> None:
        for one in view.events[len(self._told) :]:
            if not self._kinds or _kind(one) in self._kinds:
                sys.stdout.write("".join(f"{line}\n" for line in self._lines(one, view.goal)))
            self._told.append(one)
        sys.stdout.flush()

    def _lines(self, one: Timed, goal: int) -> Iterator[str]:
        lines = [] if self._as_json else event_lines(one, goal, self._told)
        # What the console has no words for is shown as it is.
        yield from lines or [json.dumps(_record(one)) if self._as_json else clean(_raw(one))]


def _kind(one: Timed) -> str:
    return one.event.kind if isinstance(one.event, Unread) else kind_name(type(one.event))


def _record(one: Timed) -> dict[str, object]:
    if isinstance(one.event, Unread):
        return {"time": one.time_s, "event": one.event.kind, **one.event.fields}
    return to_record(one.event, time_s=one.time_s)


def _raw(one: Timed) -> str:
    record = _record(one)
    fields = ", ".join(f"{name}={value}" for name, value in record.items() if name not in ("time", "event"))
    return f"EVENT {clock(one.time_s)} {_kind(one)}: {fields}"


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast events",
        allow_abbrev=False,
        description="Tells what has happened in a run, attempt after attempt.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run; the newest if left out")
    add_root(parser)
    parser.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help=f"go on until the run ends; exit code {DRIVER_GONE} if its driver is gone without a word and none comes "
        f"for {PATIENCE_S:.0f} s",
    )
    parser.add_argument(
        "--kind", action="append", metavar="K", help=f"only these, repeatable or with commas: {', '.join(kinds())}"
    )
    parser.add_argument("--json", action="store_true", help="print the records, one JSON object a line")
    return parser
