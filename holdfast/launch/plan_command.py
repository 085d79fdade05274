"""``holdfast plan``: how often to save, from the numbers of a run, from options or from assumptions.

What is advised is computed by :mod:`holdfast.launch.plan_advice`; here its input is gathered, each value with its
origin, and the answer is printed. Loads the standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from holdfast.errors import ConfigurationError
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.plan_advice import advise, group_problems
from holdfast.launch.plan_options import OPTIONS, given_in, resolved
from holdfast.launch.plan_words import as_json, as_text
from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_facts import measured

__all__ = ["plan"]


def plan(words: Sequence[str]) -> int:
    """Print the advice for the command line ``words``; the exit code. Raises: ConfigurationError with all problems."""
    parser = _parser()
    args = parser.parse_args(list(words))
    if args.help:
        sys.stdout.write(parser.format_help())
        return 0
    given, bad = given_in(vars(args))
    problems = list(bad.values())
    run: RunDir | None = None
    if args.run is not None:
        try:
            run = find_run(args.run, args.root)
        except ConfigurationError as error:
            problems += error.problems
    values = resolved(given, {} if run is None else measured(run))
    numbers = {name: value.number for name, value in values.items()}
    if not bad.keys() & {"nodes", "group", "parity"}:  # otherwise the groups are not those that were meant
        problems += group_problems(numbers)
    if problems:
        raise ConfigurationError(problems)
    advice = advise(numbers)
    show = as_json if args.json else as_text
    sys.stdout.write(show(run, values, advice))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast plan",
        add_help=False,
        allow_abbrev=False,
        description="Advises snapshot.every_steps and snapshot.persist_every_steps, and says what the groups of nodes "
        "survive and what is left for training. Values come from RUN, from options, or are assumed.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run whose measured values to use")
    parser.add_argument("--help", "-h", action="store_true", help="show this and exit")
    add_root(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    for option in OPTIONS:
        unit = option.name.rpartition("_")[2].upper() if option.name.endswith(("_s", "_h")) else "X"
        parser.add_argument(option.flag, metavar=unit, help=f"{option.means} (assumed: {option.assumed})")
    return parser
