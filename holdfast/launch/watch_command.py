"""``holdfast watch``: a run live in the terminal, or as plain lines in a pipe. Loads neither torch nor Ray."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from holdfast import events as e
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.following import PATIENCE_S, views
from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_state import DRIVER_GONE, exit_code_of, state_of
from holdfast.launch.run_view import RunView
from holdfast.launch.run_words import event_lines, facts, one_line, pace_of
from holdfast.launch.wording import clean, duration

__all__ = ["screen", "sparkline", "watch"]

_LOOK_S, _LINE_S = 0.5, 10.0
_NEWEST_STEPS = 2000
_EVENTS = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"RUNNING": "green", "FINISHED": "green", "ERRORED": "red", "ABORTED": "yellow", "RESTARTING": "red"}


def watch(words: Sequence[str]) -> int:
    """Show the run of the command line ``words`` until it ends; the exit code. Raises: ConfigurationError."""
    args = _parser().parse_args(list(words))
    run = find_run(args.run, args.root)
    console = Console(highlight=False, markup=False, emoji=False)
    view = _live(run, console) if console.is_terminal and not console.is_dumb_terminal else _plain(run)
    return DRIVER_GONE if exit_code_of(view) == DRIVER_GONE else 0


def _live(run: RunDir, console: Console) -> RunView:
    with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
        for view in views(run, every_s=_LOOK_S, newest_steps=_NEWEST_STEPS):
            live.update(screen(view, console.width), refresh=True)
    return view


def _plain(run: RunDir) -> RunView:
    """Each event as it comes, and now and then how far the run is."""
    shown, last_s = 0, -math.inf
    for view in views(run, every_s=_LOOK_S, newest_steps=_NEWEST_STEPS):
        lines = [line for i in range(shown, len(view.events)) for line in _lines(view, i)]
        shown = len(view.events)
        if view.now_s - last_s >= _LINE_S or view.is_over:
            last_s = view.now_s
            lines.append(one_line(view))
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    return view


def _lines(view: RunView, index: int) -> list[str]:
    return event_lines(view.events[index], view.goal, view.events[:index])


# -- the screen -------------------------------------------------------------------------------------------------------


def screen(view: RunView, width: int) -> RenderableType:
    """Everything to see at this moment, in ``width`` columns."""
    state = state_of(view)
    head = Text.assemble(
        (f" {state.word} ", f"bold reverse {_COLOURS.get(state.word, 'yellow')}"), f" {clean(state.why)}"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in facts(view).items():
        if name != "state":
            table.add_row(Text(name), Text(clean(value)))
    return Group(head, *_progress(view, width), table, Text(), *_recent(view, width))


def _progress(view: RunView, width: int) -> Iterator[RenderableType]:
    if not view.steps:
        return
    step = view.steps[-1].report.step
    if view.goal:
        left_s = (view.goal - step) * pace_of(view).step_s if view.driver is not None else 0.0
        bar = Table.grid(padding=(0, 2))
        to_go = f", {duration(left_s)} to go" if left_s > 0 else ""
        progress = ProgressBar(total=view.goal, completed=step, width=max(min(width - 40, 60), 10))
        bar.add_row(progress, Text(f"step {step:,} of {view.goal:,}{to_go}"))
        yield bar
    yield Text(f"loss {sparkline([line.report.loss for line in view.steps], min(width - 30, 60))}")


def sparkline(values: Sequence[float], width: int) -> str:
    """Means of neighbours as blocks, with the lowest and the highest of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = -(-len(finite) // max(width, 1))
    means = [math.fsum(part) / len(part) for part in (finite[i : i + size] for i in range(0, len(finite), size))]
    low, high = min(means), max(means)
    top = len(_BLOCKS) - 1
    line = "".join(_BLOCKS[round(top * (mean - low) / (high - low)) if high > low else 0] for mean in means)
    return f"{line} {high:.3f} to {low:.3f}"


def _recent(view: RunView, width: int) -> Iterator[Text]:
    """The first line of each of the newest events."""
    first = max(0, len(view.events) - _EVENTS)
    for index in range(first, len(view.events)):
        if not isinstance(view.events[index].event, e.RunStarted):
            for line in _lines(view, index)[:1]:
                yield Text(line[:width], no_wrap=True, overflow="ellipsis")


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast watch",
        allow_abbrev=False,
        description="Shows a run until it ends or Ctrl-C: live in a terminal, as lines in a pipe. Exit code "
        f"{DRIVER_GONE} if its driver is gone without a word and none comes for {PATIENCE_S:.0f} s.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run; the newest if left out")
    add_root(parser)
    return parser
