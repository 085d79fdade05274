"""Wishes and answers as files: whole or not there, one number each, the last word wins."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from holdfast.launch import inject_files
from holdfast.launch.inject_files import Answer, State, Wish


def test_a_wish_is_heard_with_its_number_and_once(tmp_path: Path) -> None:
    assert list(inject_files.wishes(tmp_path, 0)) == []
    assert inject_files.ask(tmp_path, "sigkill rank=1", "me") == 1
    assert inject_files.ask(tmp_path, "exit rank=0", "you") == 2
    assert list(inject_files.wishes(tmp_path, 0)) == [Wish(1, "sigkill rank=1", "me"), Wish(2, "exit rank=0", "you")]
    assert [wish.number for wish in inject_files.wishes(tmp_path, 1)] == [2]
    assert sorted(path.name for path in (tmp_path / "inject").iterdir()) == ["001.json", "002.json"]


def test_wishes_of_many_at_once_have_different_numbers(tmp_path: Path) -> None:
    numbers: list[int] = []
    crowd = [
        threading.Thread(target=lambda n=n: numbers.append(inject_files.ask(tmp_path, f"exit rank={n}", "")))
        for n in range(20)
    ]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert sorted(numbers) == list(range(1, 21))
    assert {wish.entry for wish in inject_files.wishes(tmp_path, 0)} == {f"exit rank={n}" for n in range(20)}


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"by": "me"}'])
def test_whatever_is_no_wish_has_no_entry(content: str, tmp_path: Path) -> None:
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "007.json").write_text(content)
    (tmp_path / "inject" / "notes.json").write_text("{}")
    assert list(inject_files.wishes(tmp_path, 0)) == [Wish(7, "", "")]


def test_an_answer_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    number = inject_files.ask(tmp_path, "sigkill rank=1", "me")
    assert inject_files.answer_to(tmp_path, number) is None
    for answer in (Answer(State.ACCEPTED), Answer(State.STRUCK, step=7)):
        inject_files.answer(tmp_path, number, answer)
        assert inject_files.answer_to(tmp_path, number) == answer
    assert [wish.number for wish in inject_files.wishes(tmp_path, 0)] == [1]


def test_only_what_is_accepted_can_still_change() -> None:
    assert [state for state in State if not Answer(state).is_final] == [State.ACCEPTED]
