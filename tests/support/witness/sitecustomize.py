"""Makes processes witnesses that no test starts itself: those of a driver in its own process, and Ray's actors.

Python imports this when it starts with this folder on its path. See :mod:`tests.support.strikes`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _watch_hosts(module: Any) -> None:
    make_host = module.make_host

    def made(role: Any, spec: Any) -> Any:
        if os.environ.get("HOLDFAST_WITNESS"):
            from tests.support.strikes import watch

            watch(os.environ["HOLDFAST_WITNESS"], role, spec)
        return make_host(role, spec)

    module.make_host = made


def _watch_actors(module: Any) -> None:
    from tests.support.strikes import tell_actors

    tell_actors(module.RayFleet)


_PATCHES: dict[str, Callable[[Any], None]] = {
    "holdfast.launch.hosts": _watch_hosts,
    "holdfast.launch.ray_fleet": _watch_actors,
}


class _Patched(Loader):
    def __init__(self, loader: Loader, patch: Callable[[Any], None]) -> None:
        self._loader, self._patch = loader, patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _PATCHES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Patched(spec.loader, _PATCHES[name])
        return spec


if os.environ.get("HOLDFAST_WITNESS"):
    sys.meta_path.insert(0, _Finder())
