"""``holdfast adapt``: teach a frozen model one domain after the other, each in a run of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from holdfast import knobs
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.launch.adapt_choices import MODES
from holdfast.launch.adapt_teach import teach
from holdfast.launch.adapt_words import curricula_table
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.curriculum import Curriculum, find_curriculum, list_curricula
from holdfast.launch.wording import size

__all__ = ["adapt"]


def adapt(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code. Raises: ConfigurationError with all mistakes."""
    first = words[0] if words else ""
    if first in ("-h", "--help", ""):
        sys.stdout.write(_HELP)
        return 0 if first else 2
    try:
        return _ACTIONS[first](_parser(first).parse_args(list(words[1:]))) if first in _ACTIONS else teach(words)
    except ManifestMismatch as error:  # files that the user can put back
        raise ConfigurationError(str(error)) from error


_HELP = """\
holdfast adapt domains=[PATH,...] adapter.base=FILE [GROUP=OPTION ...] [KEY=VALUE ...]

Teaches a frozen model one domain after the other. Each domain is a file or directory of text, PATH or NAME:PATH, and is
learned by a run of its own, with everything that holdfast train can be told. Then it prints, in bits per byte, what
each domain had become after each. The same words again go on where they were.

  domains=[...]        which domains, in this order; the same as adapter.domains
  adapter.base=FILE    frozen weights, such as <run>/export/model.safetensors, with model=… as in that run
  adapter.method=NAME  how to learn; without it mora. adapter.options.rank=8 and the like are of the method
  adapter.rounds=N     tasks for each domain, each on top of those before it
  adapter.keep_best=true
                       end with the best state that trainer.eval_every has seen; adapter.spike and .patience end early
  adapter.protected_directions=N
                       of each earlier domain, that a new one stays out of, for methods with a projection
  run_id=NAME          name of the curriculum; with it, domains can be added behind those that are learned

holdfast adapt --list                what was learned so far, and which methods there are
holdfast adapt route "TEXT"          which domains' tasks serve a text best, and what the router says
holdfast adapt generate "TEXT"       what the model writes, with the tasks that the router chooses or that serve best,
                                     or with --mode ungated, own-only, prefix, routed or oracle
holdfast adapt export --to DIR       base and tasks as one model.safetensors, where the method adds up

Exit codes: as holdfast train.
"""


def _parser(action: str) -> Parser:
    parser = Parser(prog=f"holdfast adapt {action}", allow_abbrev=False)
    add_root(parser)
    if action == "--list":
        return parser
    parser.add_argument("--run", metavar="NAME", help="name or directory of the curriculum; the newest if left out")
    if action == "export":
        parser.add_argument("--to", required=True, metavar="DIR", help="folder of the file, made if it does not exist")
        parser.add_argument("--first", type=int, metavar="N", help="the first N tasks instead of all")
        return parser
    parser.add_argument("text", metavar="TEXT", help="what is written so far")
    if action == "generate":
        parser.add_argument(
            "--mode",
            choices=MODES,
            help="which tasks act, instead of those that serve best: all, those of "
            "--domain, those until --domain was learned, what the router chooses, what a search finds",
        )
        parser.add_argument("--domain", metavar="NAME", help="of the modes own-only and prefix")
        parser.add_argument("--task", metavar="NAME", help="let only this task act")
        parser.add_argument("--first", type=int, metavar="N", help="let the first N tasks act, 0 for the bare base")
        parser.add_argument("--bytes", type=int, default=200, metavar="N", help="how much to write (200)")
        parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest (0.8)")
        parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser


def _root(args: argparse.Namespace) -> Path:
    return Path(args.root).expanduser().absolute() if args.root else knobs.home()


def _list(args: argparse.Namespace) -> int:
    from holdfast.adapters.registry import method_names

    found = list_curricula(_root(args))
    sys.stdout.write("".join(f"{line}\n" for line in _listing(found)))
    sys.stdout.write(f"methods  {', '.join(method_names())}\n")
    return 0


def _listing(found: Sequence[Curriculum]) -> Iterator[str]:
    if not found:
        yield "nothing was learned so far"
    for curriculum in found:
        yield curricula_table(curriculum, curriculum.record())


def _route(args: argparse.Namespace) -> int:
    from holdfast.launch.adapt_prompt import Prompted

    prompted = Prompted(find_curriculum(args.run, _root(args)))
    sys.stdout.write(prompted.routes(args.text))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from holdfast.launch.adapt_prompt import Asked, Prompted

    prompted = Prompted(find_curriculum(args.run, _root(args)))
    sys.stdout.write(
        prompted.write(
            args.text,
            Asked(args.mode, args.domain, args.task, args.first),
            n=args.bytes,
            temperature=args.temperature,
            seed=args.seed,
        )
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from holdfast.launch.adapt_prompt import Prompted

    path = Path(args.to).expanduser().absolute() / "model.safetensors"
    size_bytes = Prompted(find_curriculum(args.run, _root(args))).export(path, first=args.first)
    sys.stdout.write(f"{path}  {size(size_bytes)}\n")
    return 0


_ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "--list": _list,
    "route": _route,
    "generate": _generate,
    "export": _export,
}
