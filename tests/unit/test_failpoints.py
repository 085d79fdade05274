"""Named failpoints: armed ones fire, others cost nothing, and names in the code are those that can be armed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast
from holdfast import failpoints
from holdfast.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _nothing_armed() -> Iterator[None]:
    failpoints.disarm()
    yield
    failpoints.disarm()


def _names_hit() -> set[str]:
    """Every name that the package passes to ``failpoints.hit``."""
    found = set()
    for path in Path(holdfast.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.hit":
                assert isinstance(node.args[0], ast.Constant), f"{path.name} hits a name that only running tells"
                found.add(str(node.args[0].value))
    return found


def test_every_name_is_declared_where_it_is_hit_and_hit_where_it_is_declared() -> None:
    assert _names_hit() == set(failpoints.NAMES)


def test_a_hook_gets_name_and_step_whenever_its_place_is_reached() -> None:
    calls: list[tuple[str, int]] = []
    failpoints.arm("step.begin", lambda name, step: calls.append((name, step)))
    failpoints.hit("step.begin", 3)
    failpoints.hit("step.before_update", 3)
    failpoints.hit("step.begin")
    assert calls == [("step.begin", 3), ("step.begin", -1)]


def test_what_a_hook_raises_comes_out_at_the_failpoint() -> None:
    def fault(*_: object) -> None:
        raise MemoryError("no more")

    failpoints.arm("step.begin", fault)
    with pytest.raises(MemoryError, match="no more"):
        failpoints.hit("step.begin", 1)


def test_a_later_hook_replaces_an_earlier_one() -> None:
    calls: list[str] = []
    failpoints.arm("step.begin", lambda *_: calls.append("first"))
    failpoints.arm("step.begin", lambda *_: calls.append("second"))
    failpoints.hit("step.begin")
    assert calls == ["second"]


def test_one_hook_or_all_can_be_forgotten() -> None:
    calls: list[str] = []
    for name in ("step.begin", "step.after_update", "export.begin"):
        failpoints.arm(name, lambda name, _: calls.append(name))
    failpoints.disarm("step.begin")
    failpoints.disarm("step.begin")
    failpoints.hit("step.begin")
    failpoints.hit("export.begin")
    failpoints.disarm()
    failpoints.hit("step.after_update")
    assert calls == ["export.begin"]


def test_a_with_block_disarms_whatever_happens_in_it() -> None:
    calls: list[str] = []

    def fault(name: str, _: int) -> None:
        calls.append(name)
        raise OSError("inside")

    with pytest.raises(OSError, match="inside"), failpoints.armed("step.begin", fault):
        failpoints.hit("step.begin")
    failpoints.hit("step.begin")
    assert calls == ["step.begin"]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("step.beginn", "did you mean 'step.begin'"), ("snapshot.commit", "did you mean 'snapshot."), ("x", "choose one")],
)
def test_a_misspelled_name_is_an_error_where_it_is_armed(wrong: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"failpoint '{wrong}' does not exist; {hint}"):
        failpoints.arm(wrong, lambda *_: None)
    with pytest.raises(ConfigurationError), failpoints.armed(wrong, lambda *_: None):
        pytest.fail("the block was entered")
    assert failpoints.check_name("step.begin") == "step.begin"
