"""LoRA folders of Hugging Face PEFT, in and out, without PEFT::

    adapters.load_peft(model, Path("adapter"))  # any nn.Module with the layers' names, of transformers or not
    adapters.save_peft(model, Path("adapter"))  # PeftModel.from_pretrained(base, "adapter") reads it

Between the two the LoRA is a finished task like any other: it can be trained on (``start_task``), saved with its
lineage (``save_adapters``) or merged: ``model.load_state_dict(merge(model), strict=False)`` leaves a model with full
weights, to be saved as such. That raises ConfigurationError for a method whose update depends on the input.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with A [r, D] and B [O, r] of each layer, as
``base_model.model.<layer>.lora_A.weight`` and ``lora_B.weight``; A is our ``down``, c Bᵀ our ``up``. Source:
https://huggingface.co/docs/peft/developer_guides/checkpoint, checked against PEFT 0.21.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import ATTRIBUTE, Adapters, adapters_of
from holdfast.adapters.inject import inject
from holdfast.adapters.layer import compute_dtype, features, is_linear, is_transposed
from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.method import Method
from holdfast.adapters.peft_config import PeftConfig, config_for
from holdfast.adapters.registry import create_method, describe_method
from holdfast.adapters.store import finished_tasks
from holdfast.adapters.targets import exactly
from holdfast.adapters.tensor_file import decode, encode, write_whole
from holdfast.errors import ConfigurationError, ManifestMismatch

__all__ = ["PeftFolder", "load_peft", "save_peft"]

_CONFIG, _TENSORS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_SHOWN = 5
"""Problems that an error about tensors names."""

_Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""A [r, D] and B [O, r] by layer."""


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """What a folder holds. A model keeps it, on the CPU, since ``up`` is c B, rounded to the base's dtype: B would not
    come back from that bit by bit."""

    config: PeftConfig
    pairs: _Pairs
    base: Mapping[str, Tensor]
    """Weights of the base, by their keys: PEFT adds embeddings if it takes them for changed, the output layer's too."""


def load_peft(model: nn.Module, directory: Path, *, method: str = "lora", task: str = "peft") -> Adapters:
    """Inject the LoRA of a PEFT folder as a finished task; the layers, their ranks and factors come from the folder.

    ``method``: what later tasks are trained with: lora (goes on training this one), freeze_and_add, olora or oracle,
    whose new tasks have ``r`` rows and the factor of layers without a pattern. As all adapters here the rows act in the
    base's dtype.

    Everything is checked before the model is touched. Raises: ConfigurationError for a folder without adapters, a
    setting that cannot be represented, a model that has adapters, and a method of another kind; ManifestMismatch for
    tensors that are damaged, or do not fit the config or this model.
    """
    if hasattr(model, ATTRIBUTE):
        raise ConfigurationError("this model has adapters already; eject or merge them first")
    if not task:
        raise ConfigurationError("task='' must not be empty")
    kind = create_method(method)
    if kind.needs_inputs or not _adds_products(kind):
        raise ConfigurationError(
            f"method={method!r} cannot go on from a LoRA; choose lora, freeze_and_add, olora or oracle"
        )
    folder = _read(directory)
    _fit(folder, model, directory / _TENSORS)
    rows = {name: _rows(folder, name, compute_dtype(model.get_submodule(name))) for name in folder.pairs}
    adapters = inject(model, create_method(method, folder.config.options), exactly(folder.pairs))
    for name, layer in adapters.layers.items():
        layer.append(rows[name])
    adapters.tasks.append(task)
    adapters.origin = folder
    return adapters


def save_peft(
    model: nn.Module,
    directory: Path,
    *,
    only: str | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the finished tasks, or ``only`` one of them, as one LoRA for PEFT.

    What :func:`load_peft` has read and nobody has changed is written as it was: keys, bits and all of the config.
    Anything else is written with the factor 1 (``lora_alpha`` = ``r``) and ``up`` as B, so that no bit is lost either;
    tasks that add up become one LoRA, its rank the sum of theirs. ``base_model`` and ``task_type`` (``"CAUSAL_LM"``)
    go into the config.

    Raises: OSError; ConfigurationError while a task is being trained, for a task that is not there, and for a method
    that is no sum of low-rank products.
    """
    adapters = adapters_of(model)
    if not _adds_products(adapters.method):
        raise ConfigurationError(
            f"{adapters.method.name} cannot be written as a LoRA: {adapters.method.merge_refusal}; use save_adapters"
        )
    pairs = _pairs_of(adapters, _chosen(adapters, only))
    folder = adapters.origin
    if isinstance(folder, PeftFolder) and _is_as_read(folder, pairs):
        fields, tensors = dict(folder.config.fields), {**folder.base, **_named(folder.pairs)}
    else:
        fields, tensors = _fields(model, adapters, pairs), _named(pairs)
    given = {"base_model_name_or_path": base_model, "task_type": task_type}
    _write(directory, fields | {name: value for name, value in given.items() if value is not None}, tensors)


def _adds_products(method: Method) -> bool:
    return isinstance(method, LowRank) and not method.merge_refusal


def _rows(folder: PeftFolder, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a layer of this dtype gets: row-major, as from any other file, since products' last bits depend on that."""
    a_RD, b_OR = folder.pairs[name]
    wide = torch.promote_types(torch.promote_types(b_OR.dtype, dtype), torch.float32)
    return {"down": a_RD.to(dtype), "up": (b_OR.T.to(wide) * folder.config.scale(name)).to(dtype).contiguous()}


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(directory: Path) -> PeftFolder:
    path = directory / _CONFIG
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigurationError(f"{directory} holds no PEFT adapter: it has no {_CONFIG}") from error
    except ValueError as error:
        raise ManifestMismatch(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ManifestMismatch(f"{path} holds a {type(fields).__name__}, not an object with fields")
    config = PeftConfig(fields, str(path))
    return _sorted_out(_tensors(directory), config, directory / _TENSORS)


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / _TENSORS
    try:
        return decode(bytearray(path.read_bytes()), str(path))
    except FileNotFoundError as error:
        pickle = f"; {_PICKLE} is a pickle, which is not read: save it with safe_serialization=True"
        has_pickle = (directory / _PICKLE).exists()
        raise ManifestMismatch(f"{directory} has no {_TENSORS}{pickle * has_pickle}") from error


def _sorted_out(tensors: Mapping[str, Tensor], config: PeftConfig, path: Path) -> PeftFolder:
    found: dict[str, dict[str, Tensor]] = {}
    base = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensor
        else:
            base[key] = tensor
    alone = [f"{name} has lora_{next(iter(own))} only" for name, own in found.items() if len(own) == 1]
    _refuse(path, alone if found else [f"no tensor in it is called {_PREFIX}<layer>.lora_A.weight"])
    return PeftFolder(config, {name: (own["A"], own["B"]) for name, own in sorted(found.items())}, base)


def _fit(folder: PeftFolder, model: nn.Module, path: Path) -> None:
    """Raises as :func:`load_peft` does."""
    modules, config = dict(model.named_modules()), folder.config
    targets = config.targets(model)
    problems = [problem for name in folder.pairs for problem in _misfits(folder, name, modules.get(name))]
    problems += [f"{name} is not among target_modules" for name in folder.pairs if name in modules.keys() - targets]
    problems += [f"{name} is among target_modules and has no tensors" for name in targets if name not in folder.pairs]
    problems += _changed_base(folder, model)
    _refuse(path, problems)
    if config.fields.get("fan_in_fan_out") and not any(is_transposed(modules[name]) for name in folder.pairs):
        raise ConfigurationError(
            f"{config.place}: fan_in_fan_out=True says that the base's weights are [in, out], which is so for none of "
            "these layers; load the model that the adapter was trained on, or set it to false"
        )


def _changed_base(folder: PeftFolder, model: nn.Module) -> Iterator[str]:
    state = model.state_dict() if folder.base else {}
    for key, theirs in folder.base.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if (ours := state.get(name)) is None:
            yield f"{key} is no linear layer's lora_A.weight or lora_B.weight, and no weight of this model"
        elif not torch.equal(theirs.to(ours.dtype), ours.cpu()):
            yield f"{key} is another {name} than this model's; load it into the model first, if it is meant"


def _misfits(folder: PeftFolder, name: str, module: nn.Module | None) -> Iterator[str]:
    if module is None:
        yield f"{name} is no module of this model"
    elif not is_linear(module):
        yield f"{name} is a {type(module).__name__} in this model, not a linear layer"
    else:
        (d, o), rank, dtype = features(module), folder.config.rank(name), compute_dtype(module)
        have, want = [list(tensor.shape) for tensor in folder.pairs[name]], [[rank, d], [o, rank]]
        if have != want:
            yield f"{name} has lora_A and lora_B {have}, where its rank in the config and this model ask for {want}"
        elif not all(tensor.isfinite().all() for tensor in _rows(folder, name, dtype).values()):
            yield f"{name} has numbers that are not finite in {dtype}"


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise ManifestMismatch("\n".join(f"{path}: {problem}" for problem in [*problems[:_SHOWN], *more]))


# -- writing ----------------------------------------------------------------------------------------------------------


def _chosen(adapters: Adapters, only: str | None) -> list[str]:
    tasks = finished_tasks(adapters, only)
    if not tasks:
        raise ConfigurationError("there is no finished task to write; finish one first")
    if adapters.method.needs_task and len(tasks) > 1:
        raise ConfigurationError(f"{adapters.method.name} does not add {tasks} up; name one: save_peft(..., only=...)")
    return tasks


def _pairs_of(adapters: Adapters, tasks: Sequence[str]) -> _Pairs:
    pairs = {}
    for name, layer in adapters.layers.items():
        banks = [layer.task_rows(adapters.tasks.index(task)) for task in tasks]
        down_RD, up_RO = (torch.cat([bank[key] for bank in banks]).cpu() for key in ("down", "up"))
        pairs[name] = down_RD, up_RO.T
    if not any(len(a_RD) for a_RD, _ in pairs.values()):
        raise ConfigurationError(f"{adapters.method.name} has overwritten {tasks} by {adapters.tasks[-1]!r}")
    return pairs


def _is_as_read(folder: PeftFolder, pairs: _Pairs) -> bool:
    if folder.pairs.keys() != pairs.keys():
        return False
    for name, (a_RD, b_OR) in pairs.items():
        rows = _rows(folder, name, a_RD.dtype)
        if not (torch.equal(rows["down"], a_RD) and torch.equal(rows["up"].T, b_OR)):
            return False
    return True


def _fields(model: nn.Module, adapters: Adapters, pairs: _Pairs) -> dict[str, Any]:
    layers = {name: (len(a_RD), adapters.layers[name].base) for name, (a_RD, _) in pairs.items()}
    inside = tuple(f"{name}." for name in layers)
    modules = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    before = adapters.origin.config.fields if isinstance(adapters.origin, PeftFolder) else {}
    notes = {"base_model_name_or_path": None, "task_type": None, **before}
    return notes | config_for(layers, modules) | {"lora_dropout": describe_method(adapters.method)["dropout"]}


def _named(pairs: _Pairs) -> dict[str, Tensor]:
    ends = ("lora_A.weight", "lora_B.weight")
    return {f"{_PREFIX}{name}.{end}": t for name, pair in pairs.items() for end, t in zip(ends, pair, strict=True)}


def _write(directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The config goes first and comes last, so that new tensors never stand beside an old one's factor."""
    data = encode(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CONFIG).unlink(missing_ok=True)
    write_whole(directory / _TENSORS, data)
    write_whole(directory / _CONFIG, json.dumps(fields, indent=2).encode())
