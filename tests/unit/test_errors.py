"""The tree of errors, and what each of them says and carries."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable

import pytest

from holdfast import errors
from holdfast.errors import (
    Abort,
    CollectiveBroken,
    ConfigurationError,
    DataError,
    Fault,
    HoldfastError,
    InsufficientShards,
    InvariantViolation,
    ManifestMismatch,
    NonFiniteStep,
    PeerError,
    RankLost,
    RecoveryFailed,
    ShardCorrupt,
    SnapshotError,
    SnapshotMemory,
)

_EXAMPLES: list[HoldfastError] = [
    HoldfastError("broken"),
    ConfigurationError(["optim.lr=-1 must be positive", "model.d_ff=0 must be at least 1"]),
    DataError("a/b.jsonl", "no field 'text'", row=7),
    Fault("the world broke"),
    RankLost(2, "killed by SIGKILL"),
    CollectiveBroken(1, "VOTE", "connection closed"),
    NonFiniteStep(41, float("inf")),
    PeerError("10.0.0.1:4000", "fetch", "timed out", kind="KeyError"),
    SnapshotError("cannot be trusted"),
    ShardCorrupt("wq/master", rank=1, version=40, want="aa", have="bb"),
    InsufficientShards([0, 2], "their node died"),
    ManifestMismatch("other shapes"),
    SnapshotMemory(need_bytes=2_000_000, have_bytes=1_000_000, rank=3),
    RecoveryFailed("11 faults", ["first", "second"], exit_code=93),
]


def _kinds() -> list[type]:
    return [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__]


def _through_pickle(error: HoldfastError) -> HoldfastError:
    back: HoldfastError = pickle.loads(pickle.dumps(error))
    return back


def test_every_error_is_public_and_has_an_example_here() -> None:
    names = {kind.__name__ for kind in _kinds()}
    assert names == set(errors.__all__)
    assert {type(error).__name__ for error in _EXAMPLES} == names - {"InvariantViolation", "Abort"}


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in str(errors.__doc__).splitlines():
        if match := re.match(r" {4}(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(\((?P<base>\w+)\))?(  |$)", line):
            depth = len(match["branch"]) // 3
            above[depth:] = [match["name"]]
            drawn[match["name"]] = match["base"] or (above[depth - 1] if depth else "Exception")
    assert drawn == {kind.__name__: kind.__mro__[1].__name__ for kind in _kinds()}


def test_an_abort_is_no_exception_that_a_careless_handler_eats() -> None:
    assert issubclass(Abort, BaseException)
    assert not issubclass(Abort, Exception)


def test_kinds_can_be_told_apart_by_what_can_be_done_about_them() -> None:
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(SnapshotMemory, Fault)
    assert issubclass(SnapshotMemory, ConfigurationError)
    assert not issubclass(RecoveryFailed, Fault)
    assert not issubclass(InvariantViolation, HoldfastError)
    assert issubclass(InvariantViolation, AssertionError)


@pytest.mark.parametrize("error", _EXAMPLES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("again", [_through_pickle, copy.copy, copy.deepcopy])
def test_an_error_survives_the_way_to_another_process_with_all_its_facts(
    error: HoldfastError, again: Callable[[HoldfastError], HoldfastError]
) -> None:
    back = again(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_configuration_error_lists_all_problems() -> None:
    assert ConfigurationError("one").problems == ("one",)
    several = ConfigurationError(["one", "two"])
    assert several.problems == ("one", "two")
    assert str(several) == "one\ntwo"


def test_a_data_error_says_where() -> None:
    assert str(DataError("a.txt", "is empty")) == "a.txt: is empty"
    at_row = DataError("a.jsonl", "no text", row=0)
    assert str(at_row) == "a.jsonl, row 0: no text"
    assert (at_row.path, at_row.row, at_row.reason, at_row.problems) == ("a.jsonl", 0, "no text", (str(at_row),))


@pytest.mark.parametrize(
    ("error", "says", "carries"),
    [
        (RankLost(2, "killed"), "rank 2 lost: killed", {"rank": 2, "cause": "killed"}),
        (
            CollectiveBroken(1, "VOTE", "closed"),
            "rank 1 lost its peers in VOTE: closed",
            {"rank": 1, "phase": "VOTE", "detail": "closed"},
        ),
        (NonFiniteStep(41, float("inf")), "loss=inf at step 41", {"step": 41, "value": float("inf")}),
        (NonFiniteStep(41, float("inf")), "lower optim.lr", {}),
        (
            ShardCorrupt("wq/master", rank=1, version=40, want="aa", have="bb"),
            "slice 'wq/master' of rank 1, version 40: digest bb does not match aa",
            {"name": "wq/master", "rank": 1, "version": 40, "want": "aa", "have": "bb"},
        ),
        (
            InsufficientShards([0, 2], "their node died"),
            "nothing for ranks [0, 2]: their node died",
            {"missing": (0, 2), "reason": "their node died"},
        ),
        (
            SnapshotMemory(need_bytes=2_000_000, have_bytes=1_000_000, rank=3),
            "snapshots of rank 3 need 2,000,000 bytes of host memory, 1,000,000 are allowed; raise",
            {"need_bytes": 2_000_000, "have_bytes": 1_000_000, "rank": 3},
        ),
        (
            RecoveryFailed("11 faults", ["first", "second"], exit_code=93),
            "11 faults",
            {"reason": "11 faults", "history": ("first", "second"), "exit_code": 93},
        ),
    ],
)
def test_a_message_names_the_thing_and_the_fields_carry_it(
    error: HoldfastError, says: str, carries: dict[str, object]
) -> None:
    assert says in str(error)
    assert carries.items() <= vars(error).items()


def test_a_recovery_that_failed_ends_the_run_with_one_unless_it_says_otherwise() -> None:
    assert RecoveryFailed("no more").exit_code == 1
    assert RecoveryFailed("no more").history == ()
