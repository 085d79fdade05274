"""``adapter_config.json`` of Hugging Face PEFT: which layers a LoRA adapts, with which rank and factor, and what a sum
W x + c B A x cannot express. Written from PEFT's documented fields; PEFT itself need not be installed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from holdfast.adapters.layer import is_linear, is_transposed
from holdfast.adapters.targets import ALL_LINEAR, exactly
from holdfast.errors import ConfigurationError

__all__ = ["PeftConfig", "config_for"]

_MERGE = "merge it into its base with PEFT's merge_and_unload, or train one without"
_EMPTY = (None, False, "", 0)
_REFUSED = {
    "bias": "biases were trained too, and the base's are frozen here",
    "use_dora": "DoRA rescales the base weight, which no sum B A x does",
    "lora_bias": "it adds a bias to B",
    "modules_to_save": "whole layers were trained beside the LoRA",
    "trainable_token_indices": "rows of the embedding were trained beside the LoRA",
    "target_parameters": "it adapts parameters that are no layer's weight",
    "layer_replication": "it is for a model with repeated layers",
    "megatron_config": "it is for the parallel layers of Megatron",
}
"""Fields that must be empty ("none" for ``bias``), and why."""
_KEPT_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weight as it is; the others subtract something from it."""
_READ = frozenset(
    "r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules exclude_modules "
    "layers_to_transform layers_pattern fan_in_fan_out init_lora_weights peft_type".split()
)
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version megatron_core loftq_config "
    "eva_config corda_config lora_ga_config qalora_group_size runtime_config".split()
)
"""On a finished adapter whose other fields pass: notes, and how training began."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA that can be represented. Raises: ConfigurationError with every reason why it cannot."""

    fields: Mapping[str, Any]
    """All of the file, also what is not used here."""
    place: str
    """The file's name, for errors."""

    def __post_init__(self) -> None:
        problems = [*_other_kind(self.fields)] or [*_wrong_values(self.fields), *_refused(self.fields)]
        if problems:
            raise ConfigurationError([f"{self.place}: {problem}" for problem in problems])

    def rank(self, name: str) -> int:
        """r of one layer."""
        return int(self._value("r", "rank_pattern", name))

    def scale(self, name: str) -> float:
        """The factor c of B A x in one layer: α / r, or α / √r with rsLoRA (arXiv 2312.03732)."""
        return self._scale(self._value("lora_alpha", "alpha_pattern", name), self.rank(name))

    @property
    def options(self) -> dict[str, Any]:
        """Of a low-rank method: those of a layer without a pattern."""
        r = self.fields["r"]
        return {
            "rank": r,
            "scale": self._scale(self.fields["lora_alpha"], r),
            "dropout": float(self.fields.get("lora_dropout") or 0),
        }

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the modules that PEFT would adapt in a model without adapters, in the model's order.

        "all-linear" leaves the output layer out, as PEFT does: what ``model.get_output_embeddings()`` returns.
        """
        modules = {name: module for name, module in model.named_modules() if name}
        choice = self.fields["target_modules"]
        if isinstance(choice, str) and choice.lower() == ALL_LINEAR:
            output = getattr(model, "get_output_embeddings", lambda: None)()
            found = [name for name, module in modules.items() if is_linear(module) and module is not output]
        else:
            found = [name for name in modules if self._means(name, choice)]
        return [name for name in found if not _chosen(name, self.fields.get("exclude_modules") or [])]

    def _means(self, name: str, choice: str | Sequence[str]) -> bool:
        is_meant = _chosen(name, choice)
        if isinstance(choice, str) or name in choice:  # numbers of blocks restrict the ends of names only
            return is_meant
        return is_meant and self._in_a_chosen_block(name)

    def _value(self, field: str, pattern_field: str, name: str) -> Any:
        for pattern, value in (self.fields.get(pattern_field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return self.fields[field]

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.fields.get("use_rslora") else alpha / rank

    def _in_a_chosen_block(self, name: str) -> bool:
        blocks = self.fields.get("layers_to_transform")
        blocks = [blocks] if isinstance(blocks, int) else blocks
        if not blocks:
            return True
        lists = self.fields.get("layers_pattern") or []
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in ([lists] if isinstance(lists, str) else lists)]
        for start in starts or [r".*?\.[^.]*"]:
            if found := re.match(rf"{start}\.(\d+)\.", name):  # the outermost block, of nested ones
                return int(found[1]) in blocks
        return False


def config_for(layers: Mapping[str, tuple[int, nn.Module]], modules: Sequence[str]) -> dict[str, Any]:
    """The fields that make PEFT build a LoRA with a factor of 1 for these layers and no others.

    ``layers``: rank and base layer by name. ``modules``: the names of all modules of the model, without adapters.
    """
    ranks = Counter(rank for rank, _ in layers.values())
    (rank, _), *_others = ranks.most_common()
    # Anchored, since PEFT would take a bare name for the end of a longer one, too.
    pattern = {f"^{re.escape(name)}": own for name, (own, _) in layers.items() if own != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _choice(list(layers), modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": any(is_transposed(base) for _, base in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
    }


def _choice(names: Sequence[str], modules: Sequence[str]) -> str | list[str]:
    """The shortest ``target_modules`` that means exactly these."""
    for choice in (sorted({name.rpartition(".")[2] for name in names}), list(names)):
        if {name for name in modules if _chosen(name, choice)} == set(names):
            return choice
    return exactly(names)


def _chosen(name: str, choice: str | Sequence[str]) -> bool:
    if isinstance(choice, str):
        return re.fullmatch(choice, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in choice)


def _other_kind(fields: Mapping[str, Any]) -> Iterator[str]:
    if (kind := fields.get("peft_type")) != "LORA":
        yield f"peft_type={kind!r} is not 'LORA', which is all that is read; {_MERGE}"


def _refused(fields: Mapping[str, Any]) -> Iterator[str]:
    for field, why in _REFUSED.items():
        value = fields.get(field)
        if not (_is_empty(value) or (field == "bias" and value == "none")):
            yield f"{field}={value!r} cannot be represented: {why}; {_MERGE}"
    if (how := fields.get("init_lora_weights", True)) not in _KEPT_BASE:
        yield (
            f"init_lora_weights={how!r} has changed the base weights, so that the adapter does not fit the original "
            "ones; let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for field, value in fields.items():
        if field not in _READ | _WITHOUT_EFFECT | _REFUSED.keys() and not _is_empty(value):
            yield f"{field}={value!r} is a field that is not known here and may change the result; {_MERGE}"


def _is_empty(value: object) -> bool:
    return value in _EMPTY or value in ([], {})


def _wrong_values(fields: Mapping[str, Any]) -> Iterator[str]:
    rules: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "r": (_is_rank, "must be a whole number above 0"),
        "lora_alpha": (_is_alpha, "must be a finite number and not 0"),
        "lora_dropout": (lambda v: v is None or (_is_number(v) and 0 <= v < 1), "must be at least 0 and below 1"),
        "use_rslora": (lambda v: v in (None, True, False), "must be true or false"),
        "fan_in_fan_out": (lambda v: v in (None, True, False), "must be true or false"),
        "rank_pattern": (lambda v: _is_pattern(v, _is_rank), "must give expressions whole numbers above 0"),
        "alpha_pattern": (lambda v: _is_pattern(v, _is_alpha), "must give expressions finite numbers, not 0"),
        "target_modules": (lambda v: bool(v) and _is_choice(v), "must be names, an expression or 'all-linear'"),
        "exclude_modules": (lambda v: v is None or _is_choice(v), "must be names or an expression"),
        "layers_to_transform": (_are_blocks, "must be whole numbers"),
        "layers_pattern": (lambda v: v is None or _is_choice(v), "must be names"),
    }
    for field, (is_right, rule) in rules.items():
        if not is_right(value := fields.get(field)):
            yield f"{field}={value!r} {rule}; take the file that PEFT has written"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: object) -> bool:
    return _is_number(value) and value != 0


def _are_blocks(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(number, int) for number in numbers)


def _is_choice(value: object) -> bool:
    if isinstance(value, str):
        return _is_expression(value)
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(value: object, is_right: Callable[[object], bool]) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_is_expression(key) and is_right(own) for key, own in value.items())


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True
