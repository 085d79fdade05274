"""Any nested state comes back as it was, types and bits, without pickle."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.fault_tolerance.state_tree import Leaves, put_together, take_apart

_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_TENSORS = st.lists(st.integers(-9, 9), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.int16))
_KEYS = st.integers() | st.text(max_size=5)
_TREES = st.recursive(
    _PLAIN | _TENSORS,
    lambda below: st.lists(below, max_size=3) | st.lists(below, max_size=3).map(tuple) | st.dictionaries(_KEYS, below),
    max_leaves=8,
)


def _there_and_back(tree: object) -> object:
    leaves: Leaves = {}
    told = json.loads(json.dumps(take_apart(tree, "root", leaves)))
    return put_together(told, list(leaves.values()))


def _told(tree: Any) -> str:
    """Types and values, in which NaN equals NaN and 0.0 is not -0.0."""
    if isinstance(tree, dict):
        return f"{type(tree).__name__}{[(repr(key), _told(value)) for key, value in tree.items()]}"
    if isinstance(tree, (list, tuple)):
        return f"{type(tree).__name__}{[_told(value) for value in tree]}"
    return f"{tree.dtype}{tree.tolist()}" if hasattr(tree, "dtype") else repr(tree)


@given(_TREES)
def test_whatever_is_taken_apart_is_put_together_again(tree: object) -> None:
    assert _told(_there_and_back(tree)) == _told(tree)


def test_counters_and_arrays_keep_their_kind() -> None:
    back: Any = _there_and_back({"milestones": Counter([3, 3, 5]), "words": np.array([1, 2], dtype=np.uint32)})
    assert sorted(back["milestones"].elements()) == [3, 3, 5]
    assert back["words"].dtype == np.uint32 and back["words"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": {"b": {1, 2}}}, "root/a/b is of type set"),
        ({(1, 2): 0}, "keys must be text or whole numbers"),
        ({"w": torch.eye(2).to_sparse()}, "root/w is a Tensor of layout torch.sparse_coo"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_place(tree: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says.replace("(", r"\(")):
        take_apart(tree, "root", {})


@pytest.mark.parametrize("told", [{"tensor": 3}, {"object": 1}, {"dict": [1]}, {"list": 1, "dict": 2}])
def test_what_nobody_has_written_is_no_state(told: object) -> None:
    with pytest.raises(ManifestMismatch):
        put_together(told, [])
