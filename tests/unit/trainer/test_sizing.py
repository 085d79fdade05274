"""Counting parameters and operations without a model, held against models that exist."""

from __future__ import annotations

import math
import re
from ast import literal_eval
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import holdfast.configs
from holdfast.trainer import sizing
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder

_PRESETS = [
    path
    for path in sorted((Path(holdfast.configs.__path__[0]) / "model").glob("*.yaml"))
    if path.stem not in ("hf", "module")  # which have no size of their own
]
_SMALL = ModelConfig(d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, max_seq_len=16)


def _preset(path: Path) -> ModelConfig:
    """Our presets are flat ``key: value`` lines."""
    read = {"true": "True", "false": "False"}
    pairs = (line.split(": ") for line in path.read_text().splitlines() if line and not line.startswith("#"))
    values: dict[str, Any] = {k: v if k == "name" else literal_eval(read.get(v, v)) for k, v in pairs}
    return ModelConfig(**values)


def _built(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_as_many_parameters_as_counted_and_about_as_many_as_its_name_says(path: Path) -> None:
    config = _preset(path)
    count = sum(parameter.numel() for parameter in _built(config).parameters())
    assert sizing.parameter_count(config) == count
    assert config.name == path.stem
    digits, unit, fraction = re.fullmatch(r"(\d+)([mb])(\d*)", config.name).groups()  # type: ignore[union-attr]
    named = float(f"{digits}.{fraction or 0}") * {"m": 1e6, "b": 1e9}[unit]
    assert count == pytest.approx(named, rel=0.03 if count > 5e6 else 0.25)


def test_there_are_presets_from_one_million_to_one_and_a_half_billion() -> None:
    assert {path.stem for path in _PRESETS} >= {"1m", "10m", "125m", "1b5"}


@pytest.mark.parametrize(
    "config", [replace(_SMALL, tie_embeddings=True), replace(_SMALL, n_kv_heads=1), replace(_SMALL, n_kv_heads=4)]
)
def test_tied_tables_and_shared_heads_are_counted_once(config: ModelConfig) -> None:
    model = _built(config)
    assert sizing.parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_the_default_model_is_the_preset_that_it_is_named_after() -> None:
    (path,) = [path for path in _PRESETS if path.stem == ModelConfig().name]
    assert asdict(ModelConfig()) == asdict(_preset(path))


# -- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [_SMALL, replace(_SMALL, n_kv_heads=4), replace(_SMALL, tie_embeddings=True)])
@pytest.mark.parametrize("seq_len", [5, 16])
def test_operations_per_token_are_those_that_torch_counts(config: ModelConfig, seq_len: int) -> None:
    model, tokens = _built(config), torch.zeros(2, seq_len, dtype=torch.int64, device="meta")
    # The plain kernel, which like the formula computes the scores that the mask throws away.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert sizing.flops_per_token(config, seq_len) * tokens.numel() == counter.get_total_flops()


def test_recomputed_operations_are_not_counted() -> None:
    recomputing = replace(_SMALL, activation_checkpointing=True)
    assert sizing.flops_per_token(recomputing, 16) == sizing.flops_per_token(_SMALL, 16)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"d_model": 0}, "model.d_model=0 must be at least 1"),
        ({"n_layers": 0}, "model.n_layers=0 must be at least 1"),
        ({"n_heads": 0}, "model.n_heads=0 must be at least 1"),
        ({"n_kv_heads": 0}, "model.n_kv_heads=0 must be at least 1"),
        ({"d_ff": -3}, "model.d_ff=-3 must be at least 1"),
        ({"max_seq_len": 0}, "model.max_seq_len=0 must be at least 1"),
        ({"vocab_size": 258}, "model.vocab_size=258 must be at least 259"),
        ({"rope_theta": 0.0}, "model.rope_theta=0.0 must be positive"),
        ({"rope_theta": math.nan}, "model.rope_theta=nan must be positive"),
        ({"rope_theta": math.inf}, "model.rope_theta=inf must be positive and finite"),
        ({"norm_eps": -1e-5}, "model.norm_eps=-1e-05 must be positive"),
        ({"norm_eps": math.inf}, "model.norm_eps=inf must be positive and finite"),
        ({"n_heads": 3, "n_kv_heads": 3}, "model.n_heads=3 must divide model.d_model=32 into heads of even size"),
        ({"n_heads": 32}, "model.n_heads=32 must divide model.d_model=32 into heads of even size"),
        ({"d_model": 33}, "model.d_model=33 must be even, because rotary embeddings turn pairs; try d_model=34"),
        ({"d_model": 1, "n_heads": 1, "n_kv_heads": 1}, "model.d_model=1 must be even"),
        ({"n_kv_heads": 3}, "model.n_kv_heads=3 must divide model.n_heads=4"),
        ({"n_kv_heads": 8}, "model.n_kv_heads=8 must divide model.n_heads=4"),
    ],
)
def test_one_mistake_is_one_sentence_with_name_value_and_rule(change: dict[str, float], problem: str) -> None:
    (found,) = sizing.check(replace(_SMALL, **change))  # type: ignore[arg-type]  # values by name
    assert found.startswith(problem)


def test_a_sound_configuration_has_no_problems() -> None:
    assert sizing.check(_SMALL) == []
    assert sizing.check(replace(_SMALL, vocab_size=sizing.MIN_VOCAB_SIZE)) == []


def test_all_mistakes_are_found_together() -> None:
    problems = sizing.check(replace(_SMALL, d_ff=0, vocab_size=2, norm_eps=0.0, n_heads=5, n_kv_heads=2))
    assert [problem.split("=")[0] for problem in problems] == [
        "model.d_ff",
        "model.vocab_size",
        "model.norm_eps",
        "model.n_heads",
        "model.n_kv_heads",
    ]


def test_advice_can_be_followed() -> None:
    advised = 0
    for d_model in range(1, 41):
        for n_heads in range(1, 13):
            for n_kv_heads in (1, 2, 5):
                config = replace(_SMALL, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads)
                tried = [m for p in sizing.check(config) if (m := re.search(r"; try (\w+)=(\d+)$", p))]
                for match in tried:
                    advised += 1
                    better = replace(config, **{match[1]: int(match[2])})  # type: ignore[arg-type]  # an int by name
                    solved = f"model.{match[1]}="
                    assert not any(p.startswith(solved) for p in sizing.check(better)), (config, match[0])
    assert advised > 100


def test_advice_is_the_closest_value_that_works() -> None:
    assert sizing.check(replace(_SMALL, n_heads=7, n_kv_heads=1))[0].endswith("; try n_heads=8")
    assert sizing.check(replace(_SMALL, d_model=48, n_heads=5, n_kv_heads=1))[0].endswith("; try n_heads=4")
    assert sizing.check(replace(_SMALL, n_heads=8, n_kv_heads=5))[0].endswith("; try n_kv_heads=4")
