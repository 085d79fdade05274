"""Nested states, as ``state_dict`` returns them, taken apart into JSON values and tensors, and put together again.

Whatever is no tensor must be what JSON can tell apart after a note of its type: numbers, text, None, lists, tuples,
dictionaries and Counters. Everything else would need pickle, which runs code when it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from holdfast.errors import ConfigurationError, ManifestMismatch

__all__ = ["Leaves", "put_together", "take_apart"]

Leaves = dict[str, Tensor]
"""Path -> tensor, in the order in which the JSON refers to them."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def take_apart(tree: object, path: str, leaves: Leaves) -> object:
    """``tree`` as JSON values that name its tensors by their number in ``leaves``, to which they are added.

    Arrays of NumPy are kept as tensors. Raises: ConfigurationError naming the place of what can be neither.
    """
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(tree, Tensor) else "array"
        leaves[path] = _checked(tree, path) if isinstance(tree, Tensor) else torch.from_numpy(tree)
        return {kind: len(leaves) - 1}
    if isinstance(tree, Mapping):
        kind = "counter" if isinstance(tree, Counter) else "dict"
        return {kind: [[_key(key, path), take_apart(value, _below(path, key), leaves)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [take_apart(value, _below(path, i), leaves) for i, value in enumerate(tree)]}
    raise ConfigurationError(
        f"{path} is of type {type(tree).__name__}, which no checkpoint can hold without pickle; let state_dict return "
        "tensors, numbers, text, None, lists, tuples and dictionaries"
    )


def put_together(told: object, leaves: Sequence[Tensor]) -> object:
    """Inverse of :func:`take_apart`; the tensors become part of the tree. Raises: ManifestMismatch."""
    if not isinstance(told, Mapping):
        return told
    try:
        ((kind, content),) = told.items()
        return _BUILD[kind](content, leaves)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ManifestMismatch(f"a stored state cannot be put together: {error!r}") from error


def _pairs(content: Any, leaves: Sequence[Tensor]) -> dict[Any, Any]:
    return {key: put_together(value, leaves) for key, value in content}


_BUILD: Mapping[str, Any] = {
    "tensor": lambda content, leaves: leaves[content],
    "array": lambda content, leaves: leaves[content].numpy(),
    "dict": _pairs,
    "counter": lambda content, leaves: Counter(_pairs(content, leaves)),
    "list": lambda content, leaves: [put_together(value, leaves) for value in content],
    "tuple": lambda content, leaves: tuple(put_together(value, leaves) for value in content),
}


def _checked(tensor: Tensor, path: str) -> Tensor:
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ConfigurationError(
            f"{path} is a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}; a Snapshotter holds "
            "dense tensors of one process"
        )
    return tensor.detach()


def _key(key: object, path: str) -> str | int:
    if isinstance(key, (str, int)):
        return key
    raise ConfigurationError(f"{path} has the key {key!r}; keys must be text or whole numbers")


def _below(path: str, key: object) -> str:
    return f"{path}/{quote(str(key), safe='')}"
