"""Which linear layers of a model get adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from holdfast.adapters.layer import AdaptedLinear, is_linear
from holdfast.errors import ConfigurationError

__all__ = ["ALL_LINEAR", "exactly", "find_targets"]

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, target_modules: str | Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Names of the layers in the model's order.

    ``target_modules``: ``"all-linear"``; another string is a regular expression that has to match a linear layer's
    whole name; a list holds names or their last parts, ``"wq"`` or ``"attention.wq"``. ``exclude`` is such a list.

    Raises: ConfigurationError with every reason why the choice cannot be adapted.
    """
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ConfigurationError("this model has adapters already; eject or merge them first")
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if isinstance(target_modules, str):
        found = _matching(modules, None if target_modules == ALL_LINEAR else target_modules)
        problems = [] if found else [f"target_modules={target_modules!r} matches no linear layer; {_offer(modules)}"]
    else:
        found = [name for name in modules if _ends(name, target_modules)]
        problems = list(_unmatched(modules, target_modules))
    found = [name for name in found if not _ends(name, exclude)]
    problems += [problem for name in found if (problem := _unfit(name, modules[name]))]
    problems += _shared(model, modules, found)
    if not found and not problems:
        problems = [f"exclude={list(exclude)} leaves none of the layers that {target_modules!r} matches"]
    if problems:
        raise ConfigurationError(problems)
    return found


def exactly(names: Iterable[str]) -> str:
    """As a choice of layers: a list of names would match the ends of others, too."""
    return "|".join(re.escape(name) for name in names)


def _matching(modules: dict[str, nn.Module], pattern: str | None) -> list[str]:
    linear = [name for name, module in modules.items() if is_linear(module)]
    if pattern is None:
        return [name for name in linear if not _unfit(name, modules[name])]
    try:
        return [name for name in linear if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigurationError(f"target_modules={pattern!r} is no regular expression: {error}") from error


def _unmatched(modules: dict[str, nn.Module], suffixes: Sequence[str]) -> Iterator[str]:
    if not suffixes:
        yield f"target_modules is empty; {_offer(modules)}"
    for suffix in suffixes:
        if not any(_ends(name, [suffix]) for name in modules):
            yield f"target_modules: no module is called {suffix!r}; {_offer(modules)}"


def _unfit(name: str, module: nn.Module) -> str:
    if not is_linear(module):
        return f"{name} is a {type(module).__name__}, not a linear layer"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{name} is used by its attention layer without being called, so an adapter would do nothing"
    return ""


def _shared(model: nn.Module, modules: dict[str, nn.Module], found: Sequence[str]) -> Iterator[str]:
    """Layers and weights with several names: adapting one name would leave the others as they are."""
    owners = Counter(id(module) for module in modules.values())
    every = (p for m in model.modules() for p in m.parameters(recurse=False))
    uses = Counter(id(weight) for weight in every)
    for name in found:
        if owners[id(modules[name])] > 1:
            yield f"{name} is a layer with several names in this model; exclude it, or give each name its own"
        elif any(uses[id(p)] > 1 for p in modules[name].parameters(recurse=False)):
            yield f"{name} shares its weight with another module (a tied embedding, perhaps); exclude it or untie it"


def _ends(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _offer(modules: dict[str, nn.Module]) -> str:
    last_parts = {name.rpartition(".")[2]: None for name, module in modules.items() if is_linear(module)}
    return f"linear layers are called {', '.join(list(last_parts)[:20]) or 'nothing: there are none'}"
