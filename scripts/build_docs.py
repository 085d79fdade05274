"""Build the site in build/site from README, docs, records, examples and docstrings. A warning is an error.

What links to each other on disk links to each other on the site, since everything keeps its place.
"""

import ast
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "docs"
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile")
FOLDERS = ("docs", "benchmarks", "examples", "recipes")
GUIDES = (
    ("Start", ("first-run", "first-failure", "models-and-data", "cluster", "adapters", "reading-a-report")),
    ("Use", ("tracking", "preemption", "fault-injection", "choosing-intervals", "troubleshooting")),
    ("Move", ("migrating", "optim", "optim-interop")),
    ("Trust", ("architecture", "assumptions", "complaints", "paper-map", "peer-defects")),
)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)  # else a warning ends the build without a word
    os.chdir(ROOT)
    _gather()
    nav = [{"Holdfast": "README.md"}, *_guides(), *_decisions(), {"Reference": list(_reference())}, *_rest()]
    build(load_config(str(ROOT / "mkdocs.yml"), nav=nav))


def _gather() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, SOURCE)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, SOURCE / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _guides() -> Iterator[dict[str, Any]]:
    """By what they are for; those that nobody has sorted come last."""
    there = {path.stem for path in (SOURCE / "docs").glob("*.md")}
    sorted_in = {name for _, names in GUIDES for name in names}
    for title, names in (*GUIDES, ("More", tuple(sorted(there - sorted_in)))):
        if names:
            yield {title: [f"docs/{name}.md" for name in names]}


def _decisions() -> Iterator[dict[str, Any]]:
    records = [f"docs/decisions/{path.name}" for path in sorted((SOURCE / "docs" / "decisions").glob("[0-9]*.md"))]
    yield {"Decisions": ["docs/decisions/README.md", *records]}


def _rest() -> Iterator[dict[str, Any]]:
    records = [f"benchmarks/records/{path.name}" for path in sorted((SOURCE / "benchmarks" / "records").glob("*.md"))]
    yield {"Measured": ["benchmarks/README.md", *records]}
    yield {"Project": ["CHANGELOG.md", "CONTRIBUTING.md"]}


# -- reference --------------------------------------------------------------------------------------------------------


def _reference() -> Iterator[dict[str, Any]]:
    """A page for each package, one for the modules of each."""
    folder = SOURCE / "reference"
    folder.mkdir()
    for package in sorted({path.parent for path in (ROOT / "holdfast").rglob("*.py")}):
        name = ".".join(package.relative_to(ROOT).parts)
        if modules := [module for path in sorted(package.glob("*.py")) if (module := _public(path))]:
            text = "".join(f"\n::: {module}\n" for module in modules)
            (folder / f"{name}.md").write_text(f"# {name}\n{text}", encoding="utf-8")
            yield {name: f"reference/{name}.md"}


def _public(path: Path) -> str:
    """The module's name, if it says what others may use."""
    names = [target.id for node in ast.parse(path.read_text(encoding="utf-8")).body for target in _targets(node)]
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_public = "__all__" in names and (parts[-1] == "__init__" or not parts[-1].startswith("_"))
    return ".".join(part for part in parts if part != "__init__") if is_public else ""


def _targets(node: ast.stmt) -> list[ast.Name]:
    return [target for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]


if __name__ == "__main__":
    main()
