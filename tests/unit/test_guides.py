"""Options and commands that the guides name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.configs.options import GROUPS, kinds
from holdfast.launch.cli import main

_DOCS = Path(__file__).parents[2] / "docs"
_GUIDES = ["cluster.md", "troubleshooting.md", "migrating.md"]


@pytest.mark.parametrize("guide", _GUIDES)
def test_every_option_in_a_guide_exists(guide: str) -> None:
    sections = {key.partition(".")[0] for key in kinds() if "." in key}
    told = re.findall(r"\b([a-z]+(?:\.[a-z0-9_]+)+)\b(?!\()", (_DOCS / guide).read_text())
    is_option = {word: word.partition(".")[0] in sections for word in told}
    options = {word for word in told if is_option[word] and not word.endswith((".md", ".yaml", ".safetensors"))}
    known = set(kinds())
    assert options <= known, sorted(options - known)
    assert len(options) >= 4


@pytest.mark.parametrize("guide", _GUIDES)
def test_every_group_choice_in_a_guide_exists(guide: str) -> None:
    chosen = re.findall(rf"`({'|'.join(GROUPS)})=([a-z0-9]+)", (_DOCS / guide).read_text())
    configs = Path(__file__).parents[2] / "holdfast" / "configs"
    assert [f"{group}={name}" for group, name in chosen if not (configs / group / f"{name}.yaml").is_file()] == []


@pytest.mark.parametrize("guide", [*_GUIDES, "../README.md"])
def test_every_link_in_a_guide_leads_somewhere(guide: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (_DOCS / guide).read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (_DOCS / guide).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("command", ["submit", "doctor", "train", "plan"])
def test_every_command_in_a_guide_can_be_asked_for_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"holdfast {command}" in capsys.readouterr().out
