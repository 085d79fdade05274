"""What importing a part of Holdfast loads, in an interpreter that has loaded nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_HEAVY = ["ray", "deepspeed", "wandb", "hydra", "omegaconf"]
_HUGGING_FACE = ["transformers", "tokenizers", "datasets"]
_BESIDE_TORCH = ["numpy", "xxhash", "pyarrow", "zfec", "psutil", "safetensors", "rich"]

_BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
_IMPORT_ALL = """
import importlib, json, pkgutil, sys, warnings

warnings.simplefilter("ignore")
package = importlib.import_module({package!r})
found = pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + ".")
modules = [package] + [importlib.import_module(m.name) for m in found]
"""
_LOADED = """
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
_PUBLIC = """
public = [(module, name) for module in modules for name in getattr(module, "__all__", ())]
print(json.dumps([f"{module.__name__}.{name}" for module, name in public if not hasattr(module, name)]))
"""


def _run(code: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer: list[str] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _loaded_by(package: str, blocked: list[str]) -> set[str]:
    return set(_run(_BLOCK.format(names=blocked) + _IMPORT_ALL.format(package=package) + _LOADED))


@pytest.mark.parametrize("package", ["holdfast.optim", "holdfast.adapters", "holdfast.fault_tolerance"])
def test_a_part_for_use_alone_loads_nothing_heavy(package: str) -> None:
    """torch itself imports what it finds, numpy for one; what Holdfast may not need is blocked in the next test."""
    assert _loaded_by(package, blocked=[]) & set(_HEAVY) == set()


@pytest.mark.parametrize(
    ("package", "missing"),
    [
        ("holdfast.optim", _HEAVY + _BESIDE_TORCH),
        ("holdfast.adapters", _HEAVY + _BESIDE_TORCH),
        ("holdfast.fault_tolerance", _HEAVY),
        ("holdfast.trainer", _HUGGING_FACE),
        ("holdfast.configs", _HUGGING_FACE),
    ],
)
def test_a_part_for_use_alone_works_where_the_rest_is_not_installed(package: str, missing: list[str]) -> None:
    assert "holdfast" in _loaded_by(package, blocked=missing)


def test_the_package_itself_loads_the_standard_library_only() -> None:
    loaded = set(_run("import holdfast, json, sys" + _LOADED))
    assert loaded - set(sys.stdlib_module_names) - _present_at_start() == {"holdfast"}


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "types",
        "clock",
        "events",
        "failpoints",
        "knobs",
        "native_build",
        "optim.config",
        "fault_tolerance.config",
    ],
)
def test_root_modules_and_options_load_the_standard_library_only(module: str) -> None:
    loaded = set(_run(f"import holdfast.{module}, json, sys" + _LOADED))
    assert loaded - set(sys.stdlib_module_names) - _present_at_start() == {"holdfast"}


@pytest.mark.parametrize("module", ["holdfast.launch.hosts", "holdfast.fault_tolerance.loop_keeper"])
def test_a_keeper_process_does_not_load_torch(module: str) -> None:
    """It has to start at once and to be small; workers bring torch."""
    assert _loaded_by(module, blocked=[]) & {"torch", *_HEAVY} == set()


def test_every_public_name_exists() -> None:
    assert _run(_IMPORT_ALL.format(package="holdfast") + _PUBLIC) == []


def _present_at_start() -> set[str]:
    """What .pth files of the environment load into every interpreter."""
    return set(_run("import json, sys" + _LOADED))
