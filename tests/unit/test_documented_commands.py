"""Every ``holdfast`` command that README and docs print is one: its options exist, and its errors are those printed.

Each is led as far as its own command leads it without doing anything: to its parser, or to a configuration, which is
then checked as before a run. Commands are known by the command line's own list, so a new one is covered from its day.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs import validate
from holdfast.configs.schema import RunConfig
from holdfast.launch import cli, compose
from holdfast.trainer.config import DataSource, ModelConfig, ModelKind

_ROOT = Path(__file__).parents[2]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md")), *sorted((_ROOT / "examples").glob("*.md"))]
_FLAGS = ("--help", "--version", "-sc")


@dataclass(frozen=True)
class _Documented:
    page: str
    words: Sequence[str]
    errors: Sequence[str] = ()
    """The lines ``error: …`` that the page prints below it."""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)[:80]}"


def _documented(page: Path) -> Iterator[_Documented]:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        for number, line in enumerate(lines):
            command = re.match(r"(?:\$ )?(?:.* (?:--|&&) )?holdfast (.*)", line)
            if command:
                errors = _errors_below(lines[number + 1 :])
                yield _Documented(page.relative_to(_ROOT).as_posix(), _words(command[1]), errors)


def _errors_below(lines: Sequence[str]) -> list[str]:
    errors = []
    for line in lines:
        if not line.startswith("error: "):
            break
        errors.append(line)
    return errors


def _words(command: str) -> list[str]:
    """Without the remark behind it; dots that stand for more are left out, and those that stand for a name are one."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("…", "...")]
    return [word.replace("…", "NAME") for word in words]


_EVERY = [found for page in _PAGES for found in _documented(page)]


class _Parsed(BaseException):
    """No Exception, which the command line would report as a defect."""


class _Composed(BaseException):
    def __init__(self, config: RunConfig) -> None:
        self.config = config


@pytest.fixture
def led_to_its_parser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end once their words are understood."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    parse, depth = argparse.ArgumentParser.parse_known_args, 0

    def understand(parser: Any, *args: Any, **options: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found = parse(parser, *args, **options)
        finally:
            depth -= 1
        if depth == 0 and parser.prog not in ("holdfast train", "holdfast demo"):
            raise _Parsed
        return found

    def composed(words: Sequence[str], *rest: Any, compose_config: Any = compose.compose_config) -> Any:
        raise _Composed(compose_config(words, *rest))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", understand)
    monkeypatch.setattr(compose, "compose_config", composed)


def _with_places(config: RunConfig, tmp_path: Path) -> RunConfig:
    """What the pages name does not exist here."""
    text = tmp_path / "text.txt"
    text.write_text("some text")
    if config.model.kind is not ModelKind.DECODER or config.data.source is DataSource.HF:
        data = replace(config.data, tokenizer="", split="", path=str(text), source=DataSource.TEXT)
        config = replace(config, model=ModelConfig(), data=data)
    data = replace(config.data, path=str(text)) if config.data.path else config.data
    adapter = replace(config.adapter, base=str(text)) if config.adapter.base else config.adapter
    return replace(config, root=str(tmp_path), data=data, adapter=adapter)


def test_the_pages_name_commands() -> None:
    assert len([found for found in _EVERY if found.page == "README.md"]) >= 12
    assert {found.words[0] for found in _EVERY} >= {"train", "demo", "adapt", "plan", "checkpoint", "inject"}


@pytest.mark.parametrize("found", [found for found in _EVERY if not found.errors], ids=str)
def test_a_documented_command_is_understood(
    found: _Documented, led_to_its_parser: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found.words[0] in (*cli._COMMANDS, *_FLAGS), f"{found.page} names a command that is none"
    try:
        code = cli.main(found.words)
    except _Composed as told:
        if found.words[0] in ("train", "demo"):  # others complete the configuration themselves
            validate.refuse_bad(_with_places(told.config, tmp_path))
    except _Parsed:
        pass
    else:
        assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("found", [found for found in _EVERY if found.errors], ids=str)
def test_a_documented_mistake_is_answered_as_printed(
    found: _Documented, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    assert cli.main(found.words) == 2
    assert capsys.readouterr().err.splitlines() == list(found.errors)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_commands_named_in_a_sentence_exist(page: Path) -> None:
    named = re.findall(r"`holdfast ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))
    assert set(named) <= set(cli._COMMANDS)
