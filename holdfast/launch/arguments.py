"""The words behind a command of ``holdfast``, where argparse reads them."""

from __future__ import annotations

import argparse
from typing import NoReturn

from holdfast.errors import ConfigurationError

__all__ = ["Parser", "add_root"]


class Parser(argparse.ArgumentParser):
    """Raises ConfigurationError, so that bad arguments end like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def add_root(parser: argparse.ArgumentParser) -> None:
    """The option ``--root`` of what looks for a run; its value is for :func:`holdfast.launch.find_run.find_run`."""
    parser.add_argument("--root", metavar="DIR", help="where runs are, if not in HOLDFAST_HOME or ~/holdfast-runs")
