"""Methods by name. Every module or package in ``holdfast.adapters.methods`` has at least one: a new one is found
by itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any, TypeVar

from holdfast.adapters.method import Method
from holdfast.errors import ConfigurationError, InvariantViolation

__all__ = ["create_method", "describe_method", "method_names", "register"]

_PACKAGE = "holdfast.adapters.methods"
_CLASSES: dict[str, type[Method]] = {}
_Class = TypeVar("_Class", bound=type[Method])


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: makes a method known under ``name``."""

    def keep(method: _Class) -> _Class:
        if name in _CLASSES and _CLASSES[name].__qualname__ != method.__qualname__:
            raise InvariantViolation(f"two adapter methods are called {name!r}")
        method.name = name
        _CLASSES[name] = method
        return method

    return keep


def method_names() -> list[str]:
    """All registered names, sorted."""
    package = import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{_PACKAGE}.{module.name}")
    return sorted(_CLASSES)


def create_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """``options``: by field name, JSON values.

    Raises: ConfigurationError for an unknown name, for options that the method does not have, and for their values.
    """
    if name not in method_names():
        raise ConfigurationError(f"adapter method {name!r} does not exist; choose one of {', '.join(_CLASSES)}")
    known = [field.name for field in fields(_CLASSES[name])]  # type: ignore[arg-type]  # every method is a dataclass
    options = options or {}
    unknown = [f"{name} has no option {key!r}; it has {', '.join(known)}" for key in options if key not in known]
    if unknown:
        raise ConfigurationError(unknown)
    return _CLASSES[name](**options)


def describe_method(method: Method) -> dict[str, Any]:
    """The options, as :func:`create_method` takes them."""
    return asdict(method)  # type: ignore[call-overload,no-any-return]  # every method is a dataclass
