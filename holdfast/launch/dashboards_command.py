"""``holdfast dashboards``: hands out the Grafana dashboard and the Prometheus alerts of the package."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from holdfast.errors import ConfigurationError
from holdfast.launch.arguments import Parser

__all__ = ["FILES", "dashboards"]

FILES: Mapping[str, str] = {
    "grafana.json": "import it in Grafana (Dashboards, New, Import), or put it beside Ray's own",
    "alerts.yaml": "name it under rule_files in prometheus.yml",
}


def dashboards(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code. Raises: ConfigurationError for files that are there with
    other content, and for a directory that cannot be written."""
    to = Path(_parser().parse_args(list(words)).to).expanduser().absolute()
    contents = {to / name: (resources.files(__package__) / "dashboards" / name).read_bytes() for name in FILES}
    changed = [path for path, content in contents.items() if path.exists() and path.read_bytes() != content]
    if changed:
        names = ", ".join(map(str, changed))
        raise ConfigurationError(f"{names} exists already and is different; move it away or name another --to")
    try:
        to.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            path.write_bytes(content)
    except OSError as error:
        raise ConfigurationError(f"{to} cannot be written: {error.strerror}; name another --to") from error
    sys.stdout.write("".join(f"{path}: {FILES[path.name]}\n" for path in contents))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast dashboards",
        allow_abbrev=False,
        description="Writes a Grafana dashboard and three Prometheus alerts for runs on Ray.",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="where to; made if it does not exist")
    return parser
