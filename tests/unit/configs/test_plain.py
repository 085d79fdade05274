"""A configuration as JSON values and back."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.configs.plain import from_plain, to_plain
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError
from holdfast.types import Precision

_VALUES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type can hold."""
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return st.builds(cast(type[Any], kind), **{field.name: values_of(types[field.name]) for field in fields(kind)})
    if get_origin(kind) is list:
        return st.lists(values_of(get_args(kind)[0]), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(st.text(), st.one_of(st.none(), *_VALUES.values()), max_size=3)
    return st.sampled_from(kind) if issubclass(kind, Enum) else _VALUES[kind]


@given(values_of(RunConfig))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_configuration_survives_the_way_to_json_and_back(config: RunConfig) -> None:
    assert from_plain(to_plain(config)) == config
    assert from_plain(json.loads(json.dumps(to_plain(config)))) == config


def test_enums_travel_by_the_name_of_the_member() -> None:
    plain: Any = to_plain(RunConfig())
    assert plain["launch"]["kind"] == "LOCAL"
    assert plain["parallel"]["precision"] == "FP32"
    plain["launch"]["kind"], plain["parallel"]["precision"] = "PROCESS", "BF16"
    config = from_plain(plain)
    assert (config.launch.kind, config.parallel.precision) == (LaunchKind.PROCESS, Precision.BF16)


def test_the_plain_form_shares_no_lists_with_the_configuration() -> None:
    config = RunConfig()
    plain: Any = to_plain(config)
    plain["chaos"]["faults"].append("sigkill rank=0 step=1")
    assert config.chaos.faults == []


def test_the_plain_form_shares_no_names_with_the_configuration() -> None:
    config = RunConfig()
    plain: Any = to_plain(config)
    plain["optim"]["options"]["nesterov"] = True
    assert config.optim.options == {}
    read = from_plain(plain).optim.options
    plain["optim"]["options"].clear()
    assert read == {"nesterov": True}


def test_whole_numbers_are_numbers() -> None:
    plain: Any = to_plain(RunConfig())
    plain["optim"]["lr"] = 1
    lr = from_plain(plain).optim.lr
    assert isinstance(lr, float)
    assert lr == 1.0


@pytest.mark.parametrize(
    ("section", "key", "value", "problem"),
    [
        ("trainer", "max_steps", "300", "trainer.max_steps='300' must be of type int"),
        ("trainer", "max_steps", 1.5, "trainer.max_steps=1.5 must be of type int"),
        ("trainer", "max_steps", True, "trainer.max_steps=True must be of type int"),
        ("trainer", "max_steps", None, "trainer.max_steps=None must be of type int"),
        ("launch", "dashboard", 1, "launch.dashboard=1 must be of type bool"),
        ("launch", "kind", "local", "launch.kind='local' must be one of LOCAL, PROCESS"),
        ("optim", "betas", 0.9, "optim.betas=0.9 must be a list"),
        ("optim", "betas", ["a"], "optim.betas[0]='a' must be of type float"),
        ("chaos", "faults", "abc", "chaos.faults='abc' must be a list"),
        ("optim", "options", [1], "optim.options=[1] must be a mapping"),
        (
            *("optim", "options", {"alpha": 0.9, "seed": [1]}),
            "optim.options.seed=[1] must be a name and a number, text, true, false or null",
        ),
        (
            *("optim", "options", {1: 0.9}),
            "optim.options.1=0.9 must be a name and a number, text, true, false or null",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(section: str, key: str, value: object, problem: str) -> None:
    plain: Any = to_plain(RunConfig())
    plain[section][key] = value
    with pytest.raises(ConfigurationError) as caught:
        from_plain(plain)
    assert caught.value.problems == (problem,)


def test_missing_unknown_and_wrong_are_told_together() -> None:
    plain: Any = to_plain(RunConfig())
    del plain["seed"], plain["optim"]["lr"]
    plain["sead"], plain["optim"]["lrr"] = 1, 2
    plain["trainer"] = 3
    with pytest.raises(ConfigurationError) as caught:
        from_plain(plain)
    assert set(caught.value.problems) == {
        "seed is missing",
        "sead is unknown",
        "optim.lr is missing",
        "optim.lrr is unknown",
        "trainer=3 must be a mapping",
    }


def test_something_else_than_a_mapping_is_no_configuration() -> None:
    with pytest.raises(ConfigurationError, match="the configuration=3 must be a mapping"):
        from_plain(3)  # type: ignore[arg-type]
