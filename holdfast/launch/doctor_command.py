"""``holdfast doctor``: what would stop a training here, on the Ray cluster or in a run, one line per check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from holdfast import knobs
from holdfast.configs.schema import RunConfig
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.doctor_cluster import cluster_checks
from holdfast.launch.doctor_host import host_checks
from holdfast.launch.doctor_run import run_checks
from holdfast.launch.finding import BAD, Finding

__all__ = ["doctor"]

Checks = Callable[[RunConfig], Iterator[Finding]]


def doctor(words: Sequence[str]) -> int:
    """Print what is found; 0, or 1 if something is BAD. Raises: ConfigurationError for words that are no options."""
    parser = _parser()
    args = parser.parse_intermixed_args(list(words))
    if args.help:
        sys.stdout.write(parser.format_help())
        return 0
    from holdfast.launch.compose import compose_config

    config = compose_config(args.overrides, args.config_dir)
    config = replace(config, root=config.root or args.root or str(knobs.home()))
    is_good = True
    for finding in _findings(config, args):
        is_good = is_good and finding.level != BAD
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
    return 0 if is_good else 1


def _findings(config: RunConfig, args: argparse.Namespace) -> Iterator[Finding]:
    yield from host_checks(config)
    yield from cluster_checks(config)
    if args.run is not None:
        yield from run_checks(args.run, config, args.overrides)


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast doctor",
        add_help=False,
        allow_abbrev=False,
        description="Checks this machine, the Ray cluster of launch.address or RAY_ADDRESS, and a run. KEY=VALUE are "
        "those of holdfast train, as the training would get them. Exit code 1 if something is BAD.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--help", "-h", action="store_true", help="show this and exit")
    parser.add_argument("--run", metavar="RUN", help="id or directory of a run that is to be continued")
    parser.add_argument("--config-dir", "-cd", help="as for holdfast train")
    add_root(parser)
    return parser
