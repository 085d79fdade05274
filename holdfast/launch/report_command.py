"""``holdfast report``: a run as one HTML file and the same as Markdown. Loads neither torch nor Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from holdfast.errors import ConfigurationError
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.report_html import as_html
from holdfast.launch.report_markdown import as_markdown
from holdfast.launch.report_sections import sections, title
from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_view import RunReader
from holdfast.launch.wording import clean

__all__ = ["report", "write_report"]


def report(words: Sequence[str]) -> int:
    """Write the report for the command line ``words``; the exit code. Raises: ConfigurationError."""
    args = _parser().parse_args(list(words))
    run = find_run(args.run, args.root)
    target = Path(args.output).expanduser().absolute() if args.output else run.path / "report.html"
    if target.is_dir():
        raise ConfigurationError(f"--output={args.output} is a directory; name a file in it, such as report.html")
    if target.suffix == ".md":
        raise ConfigurationError(f"--output={args.output} must be the HTML file; the Markdown goes beside it by itself")
    try:
        written = write_report(run, target)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written: {error.strerror}; --output names another file"
        ) from error
    sys.stdout.write("".join(f"{clean(str(path))}\n" for path in written))
    return 0


def write_report(run: RunDir, target: Path) -> tuple[Path, Path]:
    """Write ``target`` and, with the suffix ``.md``, the same beside it, each whole or not at all; both paths.

    Raises: ConfigurationError if the run cannot be read; OSError.
    """
    view = RunReader(run).view()
    told = list(sections(view))
    markdown = target.with_suffix(".md")
    _write(target, as_html(title(view), told))
    _write(markdown, as_markdown(title(view), told))
    return target, markdown


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast report",
        allow_abbrev=False,
        description="Writes what happened in a run as one HTML file that needs no network and no script, and as "
        "Markdown beside it. May be used while the run goes on.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run; the newest if left out")
    add_root(parser)
    parser.add_argument("--output", metavar="FILE", help="the HTML file; RUN/report.html if left out")
    return parser
