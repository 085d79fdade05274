"""The console command ``holdfast``: every way out of it becomes a message and an exit code.

0 finished, 1 unexpected error, 2 bad configuration or arguments, 75 stopped after saving, 93 do not restart,
130 and 143 interrupted, 141 when nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from holdfast import __version__
from holdfast.errors import ConfigurationError, RecoveryFailed
from holdfast.launch.arguments import Parser

if TYPE_CHECKING:  # --help and --version load neither Hydra nor what trains
    from holdfast.configs.schema import RunConfig

__all__ = ["main"]

_BAD_ARGUMENTS, _UNEXPECTED, _INTERRUPTED, _NOT_READ = 2, 1, 130, 141
_STOPPED = frozenset({75, _INTERRUPTED, 143})
"""Somebody wanted this run to stop, so the rest of a sweep is not wanted either."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name; this process's own if None); the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return _exit_code_of(lambda: _dispatch(words))


def _exit_code_of(action: Callable[[], int]) -> int:
    try:
        return action()
    except ConfigurationError as error:
        _complain(*error.problems)
        return _BAD_ARGUMENTS
    except RecoveryFailed as error:
        _complain(error.reason)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # what is still buffered would fail again when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOT_READ
    except Exception:  # the boundary of the process: the user learns of it
        traceback.print_exc()
        return _UNEXPECTED


def _complain(*problems: str) -> None:
    sys.stderr.write("".join(f"error: {problem}\n" for problem in problems))


def _dispatch(words: Sequence[str]) -> int:
    first, rest = (words[0], words[1:]) if words else ("", words)
    if first in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if first == "--version":
        sys.stdout.write(f"holdfast {__version__}\n")
        return 0
    if first in ("-sc", "--shell-completion"):
        return _complete(words)
    if first not in _COMMANDS:
        raise ConfigurationError(_no_command(first))
    return _COMMANDS[first].run(rest)


def _help() -> str:
    width = max(map(len, _COMMANDS))
    commands = "".join(f"  {name:{width}}  {command.does}\n" for name, command in _COMMANDS.items())
    return (
        "holdfast COMMAND [ARGUMENTS]\n\n"
        "Keeps a language-model training run alive while processes and nodes go away under it.\n\n"
        f"Commands (more with holdfast COMMAND --help):\n{commands}\n"
        "  --version  show the version\n"
        "  -sc install=bash  print what makes bash complete options; see --hydra-help of train for other shells\n"
    )


def _no_command(word: str) -> str:
    known = ", ".join(_COMMANDS)
    if not word:
        return f"a command is missing; choose one of {known}, or see holdfast --help"
    near = difflib.get_close_matches(word, _COMMANDS, n=1)
    if not near and "=" in word:
        return f"{word!r} is no command; did you mean holdfast train {word}?"
    return f"{word!r} is no command; " + (f"did you mean {near[0]}?" if near else f"choose one of {known}")


def _complete(words: Sequence[str]) -> int:
    """Answer the shell, which puts the line typed so far into COMP_LINE. Hydra completes what follows ``train``; behind
    other commands nothing is offered, so that the shell completes names of files."""
    from holdfast.launch import compose

    line = os.environ.get("COMP_LINE")
    if line is not None:
        typed = re.fullmatch(r"(\S+)\s+(\S+)(\s.*)", line)
        if typed is None:
            sys.stdout.write(" ".join(_COMMANDS) + "\n")
            return 0
        if typed[2] != "train":
            return 0
        os.environ["COMP_LINE"] = typed[1] + typed[3]
    return compose.hand_over(words)


# -- holdfast train ---------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(prog="holdfast train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--multirun", "-m", action="store_true")
    # What follows is Hydra's own; it is listed to be told from overrides.
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--package", "-p")
    for flags in (("--help", "-h"), ("--hydra-help",), ("--resolve",), ("--shell-completion", "-sc")):
        parser.add_argument(*flags, action="store_true")
    return parser


def _is_for_hydra(args: argparse.Namespace) -> bool:
    own = (args.info, args.package, args.help, args.hydra_help, args.resolve, args.shell_completion)
    return any(own) or args.cfg in ("hydra", "all")


def _train(words: Sequence[str]) -> int:
    from holdfast.launch import compose

    args = _parser().parse_intermixed_args(list(words))
    if args.shell_completion:
        return compose.hand_over(words)
    if args.multirun:
        return _sweep(words, args)
    if _is_for_hydra(args):
        compose.compose_config(_split(args.overrides)[0], args.config_dir)  # its messages are better
        return compose.hand_over(words)
    config = compose.compose_config(args.overrides, args.config_dir)
    if args.cfg:
        return _show(config)
    return _run(config, args.overrides, words)


def _show(config: RunConfig) -> int:
    from holdfast.configs.plain import to_plain
    from holdfast.launch.records import to_yaml

    sys.stdout.write(to_yaml(to_plain(config)))
    return 0


def _run(config: RunConfig, overrides: Sequence[str], words: Sequence[str]) -> int:
    from holdfast.launch.run import run

    return run(config, overrides=overrides, command=["holdfast", "train", *words]).exit_code


def _sweep(words: Sequence[str], args: argparse.Namespace) -> int:
    """One run after the other, all configurations checked before the first; the largest exit code."""
    from holdfast.launch import compose

    if args.cfg or _is_for_hydra(args):
        raise ConfigurationError("--multirun runs every combination; leave it out to look at one configuration")
    ours, for_hydra = _split(args.overrides)
    combinations = compose.expand(ours, args.config_dir, with_intervals=bool(for_hydra))
    if for_hydra:  # sweepers and launchers that only Hydra can start
        return compose.hand_over(words, lambda c, overrides: _exit_code_of(lambda: _run(c, overrides, words)))
    configs = [compose.compose_config(overrides, args.config_dir) for overrides in combinations]
    _refuse_bad(configs)
    return _one_by_one(configs, combinations, words)


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of a run's configuration, and those of Hydra's."""
    for_hydra = [word for word in overrides if re.match(r"\+*hydra[./]", word)]
    return [word for word in overrides if word not in for_hydra], for_hydra


def _one_by_one(configs: Sequence[RunConfig], combinations: Sequence[Sequence[str]], words: Sequence[str]) -> int:
    worst = 0
    for number, (config, overrides) in enumerate(zip(configs, combinations, strict=True), start=1):
        sys.stderr.write(f"run {number} of {len(configs)}: {' '.join(overrides)}\n")
        code = _exit_code_of(partial(_run, config, overrides, words))
        worst = max(worst, code)
        if code in _STOPPED:
            break
    return worst


def _refuse_bad(configs: Sequence[RunConfig]) -> None:
    from holdfast.configs import validate

    problems: list[str] = []
    for config in configs:
        try:
            validate.refuse_bad(config)
        except ConfigurationError as error:
            problems += error.problems
    names = [name for config in configs if (name := _named_run(config))]
    problems += [
        f"run {name} cannot be {names.count(name)} runs of a sweep; leave out run_id and resume"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigurationError(list(dict.fromkeys(problems)))


def _named_run(config: RunConfig) -> str:
    return config.run_id or (config.resume if config.resume not in ("auto", "must", "never") else "")


def _demo(words: Sequence[str]) -> int:
    return _train(["experiment=demo", *words])


def _in(module: str, function: str) -> Callable[[Sequence[str]], int]:
    """A command that has a module of its own, which is loaded when the command is carried out."""

    def run(words: Sequence[str]) -> int:
        return int(getattr(importlib.import_module(f"holdfast.launch.{module}"), function)(words))

    return run


@dataclass(frozen=True, slots=True)
class _Command:
    does: str
    run: Callable[[Sequence[str]], int]


_COMMANDS: Mapping[str, _Command] = {
    "demo": _Command("see a run lose a worker and go on: under a minute, needs nothing", _demo),
    "train": _Command("train a language model: GROUP=OPTION and KEY=VALUE say how", _train),
    "adapt": _Command(
        "teach a frozen model one domain after the other; route and write with what it learned",
        _in("adapt_command", "adapt"),
    ),
    "status": _Command(
        "tell the state of a run, what protects it and what it has lost", _in("status_command", "status")
    ),
    "events": _Command("tell what has happened in a run, or is happening", _in("events_command", "events")),
    "report": _Command(
        "write what happened in a run as one HTML file and as Markdown", _in("report_command", "report")
    ),
    "watch": _Command("show a run live in the terminal", _in("watch_command", "watch")),
    "plan": _Command(
        "advise how often to save; say what is survived and what is left for training", _in("plan_command", "plan")
    ),
    "checkpoint": _Command(
        "list and verify the checkpoints of a run, export weights from one",
        _in("checkpoint_command", "checkpoint_command"),
    ),
    "submit": _Command(
        "run a training as a Ray job, watch it and end with its exit code", _in("submit_command", "submit")
    ),
    "doctor": _Command(
        "check this machine, its Ray and a run for what would stop a training", _in("doctor_command", "doctor")
    ),
    "export": _Command(
        "write what a run has trained as a folder for transformers or PEFT", _in("export_command", "export_command")
    ),
    "inject": _Command("break something in a run that is going on, to see it recover", _in("inject_command", "inject")),
    "wandb-sync": _Command(
        "replay a run's files to W&B: one W&B run of all attempts", _in("wandb_sync_command", "wandb_sync")
    ),
    "dashboards": _Command(
        "write a Grafana dashboard and Prometheus alerts for runs on Ray", _in("dashboards_command", "dashboards")
    ),
}
