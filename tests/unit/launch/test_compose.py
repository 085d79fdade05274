"""From overrides to a configuration, and from every kind of mistake to one sentence."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # comes with OmegaConf, its stubs do not

import holdfast.configs
from holdfast.configs import validate
from holdfast.configs.options import GROUPS
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.compose import compose_config, expand, hand_over
from holdfast.optim.config import OptimName
from holdfast.trainer.config import ModelInit, ModelKind
from holdfast.types import Precision

CONFIGS = Path(holdfast.configs.__file__).parent
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONFIGS.glob("*/*.yaml"))
OPTIONS.remove("model=hf")  # needs a directory, and transformers: see test_a_model_of_transformers_is_chosen_by_a_path
OPTIMIZERS = ", ".join(sorted(name.value for name in OptimName))
BIG = validate.Host(free_bytes=10**13)


def problems_of(*overrides: str, config_dir: str | None = None) -> tuple[str, ...]:
    return _problems(lambda: compose_config(overrides, config_dir))


def _problems(action: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        action()
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# -- what is shipped --------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_dataclasses_and_sound() -> None:
    config = compose_config([])
    assert validate.check(config, BIG) == []
    assert config == RunConfig()


_NEEDED = {
    **dict.fromkeys(("data=text", "data=jsonl", "data=parquet", "data=hf"), ("data.path=/books",)),
    "model=module": ("model.path=tests.support.own_model:build",),
    "parallel=pipeline": ("model.n_layers=6",),
    "recovery=checkfree": (
        *("parallel=pipeline", "parallel.pipeline=4", "parallel.swapped=true", "parallel.blocks=[1,1,1,1]"),
        *("model.n_layers=4", "launch.nodes=4", "trainer.global_batch=32"),
    ),
}
"""What some of them leave to the user."""


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_file_loads_and_keeps_the_rules(option: str) -> None:
    assert validate.check(compose_config([option, *_NEEDED.get(option, ())]), BIG) == []


def test_a_model_of_transformers_is_chosen_by_a_path(tmp_path: Path) -> None:
    config = compose_config(["model=hf", f"model.path={tmp_path}", "model.init=weights"])
    assert (config.model.kind, config.model.path) == (ModelKind.HF, str(tmp_path))
    assert config.model.init is ModelInit.WEIGHTS


@pytest.mark.parametrize(
    "words", [["model=tests.support.own_model:build"], ["model=module", "model.path='tests.support.own_model:build'"]]
)
def test_a_function_is_chosen_as_a_model_by_its_name(words: list[str]) -> None:
    config = compose_config([*words, "model.options.width=8", "data.seq_len=32"])
    assert (config.model.kind, config.model.name) == (ModelKind.MODULE, "module")
    assert (config.model.path, config.model.options) == ("tests.support.own_model:build", {"width": 8})
    assert validate.check(config, BIG) == []


def test_a_function_is_one_of_the_values_of_a_sweep() -> None:
    assert expand(["model=tests.support.own_model:build", "seed=0,1"]) == [
        ["model=module", 'model.path="tests.support.own_model:build"', f"seed={seed}"] for seed in (0, 1)
    ]


def test_every_optimizer_has_a_file_that_chooses_it() -> None:
    assert sorted(path.stem for path in (CONFIGS / "optim").glob("*.yaml")) == sorted(n.value for n in OptimName)
    for name in OptimName:
        assert compose_config([f"optim={name.value}"]).optim.name is name


def test_yaml_files_hold_values_only() -> None:
    for path in CONFIGS.glob("*/*.yaml"):
        assert "_target_" not in path.read_text()


def test_the_main_job_is_what_its_file_says() -> None:
    config = compose_config(["experiment=main_job"])
    assert (config.trainer.max_steps, config.launch.nodes, config.launch.spares) == (300, 3, 1)
    assert config.parallel.zero_stage == 2
    assert config.chaos.faults == ["sigkill rank=1 step=150"]


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose_config(["experiment=main_job", "launch=process", "optim=adamw", "chaos.faults=[]"])
    assert (config.launch.kind, config.optim.name) == (LaunchKind.PROCESS, OptimName.ADAMW)
    assert config.chaos.faults == []


def test_the_examples_in_the_help_work() -> None:
    """Each line that begins with the command is executed as far as its configuration."""
    template = yaml.safe_load((CONFIGS / "train.yaml").read_text())["hydra"]["help"]["template"]
    examples = re.findall(r"^  holdfast train (\S.*)$", template.partition("Examples:")[2], re.MULTILINE)
    assert len(examples) >= 5
    for example in examples:
        words = [word for word in shlex.split(example) if word != "-m"]
        for overrides in expand(words):
            assert validate.check(compose_config(overrides), BIG) == []


def test_the_help_names_every_group_in_the_defaults() -> None:
    defaults = yaml.safe_load((CONFIGS / "train.yaml").read_text())["defaults"]
    assert [next(iter(entry)) for entry in defaults if isinstance(entry, dict)] == list(GROUPS)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.max_steps=7", lambda c: c.trainer.max_steps == 7),
        ("++trainer.max_steps=7", lambda c: c.trainer.max_steps == 7),
        ("trainer={max_steps: 7, log_every: 2}", lambda c: (c.trainer.max_steps, c.trainer.log_every) == (7, 2)),
        ("trainer.max_steps=${launch.nodes}", lambda c: c.trainer.max_steps == 3),
        ("trainer.prompt=", lambda c: c.trainer.prompt == ""),
        ("trainer.prompt='for (i = 0'", lambda c: c.trainer.prompt == "for (i = 0"),
        ("trainer.prompt=3", lambda c: c.trainer.prompt == "3"),
        ("optim.lr=1", lambda c: c.optim.lr == 1.0 and isinstance(c.optim.lr, float)),
        ("optim.lr=1e-4", lambda c: c.optim.lr == 1e-4),
        ("optim.betas=[0.8,0.9]", lambda c: c.optim.betas == [0.8, 0.9]),
        ("launch.dashboard=true", lambda c: c.launch.dashboard is True),
        ("root=/a/b-c_d", lambda c: c.root == "/a/b-c_d"),
        ('chaos.faults=["sigkill rank=0 step=20"]', lambda c: c.chaos.faults == ["sigkill rank=0 step=20"]),
    ],
)
def test_a_value_arrives_with_its_type(override: str, value: Callable[[RunConfig], bool]) -> None:
    assert value(compose_config([override]))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["optim.options.nesterov=true"], {"nesterov": True}),
        (["+optim.options.nesterov=true"], {"nesterov": True}),
        (["++optim.options.nesterov=true"], {"nesterov": True}),
        (["optim.options={nesterov: true, dampening: 0}"], {"nesterov": True, "dampening": 0}),
        (["optim.options={nesterov: true}", "optim.options.dampening=0"], {"nesterov": True, "dampening": 0}),
        (["optim.options={}"], {}),
    ],
)
def test_arguments_of_the_optimizer_need_no_place_in_the_schema(words: list[str], options: dict[str, object]) -> None:
    config = compose_config(["optim=sgd", *words])
    assert type(config.optim.options) is dict and config.optim.options == options
    assert validate.check(config, BIG) == []


def test_a_sweep_over_an_argument_of_the_optimizer_is_a_sweep_like_any_other() -> None:
    words = expand(["optim=sgd", "optim.options.nesterov=true,false"])
    assert [compose_config(some).optim.options for some in words] == [{"nesterov": True}, {"nesterov": False}]


@pytest.mark.parametrize("name", ["bf16", "BF16", "Bf16"])
def test_a_member_may_be_written_in_any_case(name: str) -> None:
    assert compose_config([f"parallel.precision={name}"]).parallel.precision is Precision.BF16


def test_the_last_of_two_overrides_wins() -> None:
    assert compose_config(["seed=1", "seed=2"]).seed == 2


def test_lists_are_lists_and_nothing_of_omegaconf_is_left() -> None:
    config = compose_config(["experiment=main_job"])
    assert type(config) is RunConfig
    assert type(config.chaos.faults) is list
    assert type(config.optim.betas) is list


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optt.lr=3", "optt.lr is not an option; did you mean optim.lr?"),
        ("max_step=3", "max_step is not an option; did you mean trainer.max_steps?"),
        ("wibble=3", "wibble is not an option; see them all with --cfg job"),
        ("+wibble=3", "wibble is not an option; see them all with --cfg job"),
        ("++wibble=3", "wibble is not an option; see them all with --cfg job"),
        ("trainer={max_step: 3}", "trainer.max_step is not an option; did you mean trainer.max_steps?"),
        ("trainer.max_steps=many", "trainer.max_steps=many must be a whole number"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5 must be a whole number"),
        ("trainer.max_steps=null", "trainer.max_steps=null must be a whole number"),
        ("seed=true", "seed=true must be a whole number"),
        ("optim.lr=fast", "optim.lr=fast must be a number"),
        ("launch.dashboard=3.5", "launch.dashboard=3.5 must be true or false"),
        ("chaos.faults=abc", 'chaos.faults=abc must be a list of texts, for example ["one","two"]'),
        ("parallel.precision=fp16", "parallel.precision=fp16 must be one of FP32, BF16"),
        ("trainer=3", "trainer=3 must be a section: set the keys below it, for example trainer.max_steps=…"),
        ("optim=adamv", "optim=adamv does not exist; did you mean optim=adam?"),
        ("optim=q", f"optim=q does not exist; choose one of {OPTIMIZERS}"),
        ("optim=null", f"optim=null does not exist; choose one of {OPTIMIZERS}"),
        ("optim.options=3", "optim.options=3 must be names with values, for example {nesterov: true}"),
        ("optim.options=null", "optim.options=null must be names with values, for example {nesterov: true}"),
        ("optim.option.nesterov=true", "optim.option.nesterov is not an option; did you mean optim.options?"),
        ("optim.options.a.b=3", "optim.options.a.b is not an option; did you mean optim.options?"),
        ("experiment=null", "experiment=null does not exist; choose one of demo, main_job"),
        ("experiment=main_jobb", "experiment=main_jobb does not exist; did you mean experiment=main_job?"),
        ("+experiment=main_job", "+experiment=main_job: write experiment=…"),
        ("+seed=1", "+seed=1: seed exists; leave out the +"),
        ("~chaos", "~chaos: nothing can be removed; set it to another value or choose another option"),
        ("=3", "'=3' names no option: write KEY=VALUE or GROUP=OPTION"),
        ("max_steps", "'max_steps' cannot be read: write KEY=VALUE or GROUP=OPTION, for example trainer.max_steps=…"),
        ("seed=1,2", "seed=1,2 lists several values: add -m for one run each, or quote a text: 'seed=\"…\"'"),
        ("hydra.run.dir=x", "hydra.run.dir=x: one run is started without Hydra, so its own options change nothing; "),
        ("trainer.prompt=a (b", "'trainer.prompt=a (b' cannot be read: quote the value, 'trainer.prompt=\"…\"', if"),
        (
            "chaos.faults=[sigkill rank=1]",
            "'chaos.faults=[sigkill rank=1]' cannot be read: chaos.faults must be a list",
        ),
        ("trainer.max_steps=${launch.nods}", "trainer.max_steps: Interpolation key 'launch.nods' not found"),
        ("trainer.max_steps=${optim.lr}", "trainer.max_steps must be a whole number: "),
        ("optim@chaos=adamw", "Could not override 'optim@chaos'."),
    ],
)
def test_a_mistake_is_one_sentence_with_the_way_out(override: str, problem: str) -> None:
    (found,) = problems_of(override)
    assert found.startswith(problem)


def test_mistakes_in_several_overrides_are_told_together() -> None:
    found = problems_of("optt.lr=3", "seed=1", "a b=3", "trainer.max_steps=x", "optim=q", "parallel.precision=fp16")
    assert len(found) == 5


def test_no_mistake_is_told_as_a_chain_of_other_peoples_exceptions() -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose_config(["optt.lr=3"])
    assert caught.value.__cause__ is None


# -- the user's own files ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory of groups, with a blank in its name."""
    folder = tmp_path / "my configs"
    files = {
        "optim/mine": "lr: 0.5",
        "optim/nesterov": "name: SGD\noptions:\n  nesterov: true",
        "optim/bad_key": "lrr: 0.5",
        "optim/bad_value": "lr: fast",
        "optim/bad_member": "name: adamw",
        "optim/no_yaml": "lr: [",
        "optim/no_mapping": "- lr",
        "optim/interpolation": "lr: ${trainer.nope}",
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /optim: mine\ntrainer:\n  max_steps: 7",
        "experiment/stranger": "# @package _global_\nwibble: 1",
        "experiment/missing": "# @package _global_\ndefaults:\n  - override /optim: nope",
        "cluster/two": "# @package launch\nnodes: 2",
        "cluster/no_package": "launch:\n  nodes: 2",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text + "\n")
    return folder


def test_own_options_stand_beside_those_of_the_package(own: Path) -> None:
    assert compose_config(["optim=mine"], str(own)).optim.lr == 0.5
    assert compose_config(["optim=adamw"], str(own)).optim.name is OptimName.ADAMW


def test_own_options_may_hold_arguments_of_the_optimizer(own: Path) -> None:
    assert compose_config(["optim=nesterov"], str(own)).optim.options == {"nesterov": True}
    more = compose_config(["optim=nesterov", "optim.options.dampening=0.0"], str(own))
    assert more.optim.options == {"nesterov": True, "dampening": 0.0}


def test_an_own_experiment_builds_on_own_options(own: Path) -> None:
    config = compose_config(["experiment=mine", "seed=4"], str(own))
    assert (config.optim.lr, config.trainer.max_steps, config.seed) == (0.5, 7, 4)


def test_an_own_group_is_added_with_a_plus(own: Path) -> None:
    assert compose_config(["+cluster=two"], str(own)).launch.nodes == 2
    assert problems_of("cluster=two", config_dir=str(own)) == (
        "cluster=two: write +cluster=…, because the defaults do not name it",
    )


def test_a_relative_directory_is_meant_from_where_the_user_is(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    assert compose_config(["optim=mine"], own.name).optim.lr == 0.5


def test_a_directory_that_is_none_is_told(tmp_path: Path) -> None:
    (found,) = problems_of(config_dir=str(tmp_path / "gone"))
    assert found.startswith(f"--config-dir={tmp_path}/gone must be a directory")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim=bad_key", "optim/bad_key.yaml: optim.lrr is not an option; did you mean optim.lr?"),
        ("optim=bad_value", "optim/bad_value.yaml: optim.lr must be a number: Value 'fast'"),
        ("optim=bad_member", "optim/bad_member.yaml: optim.name must be one of ADAMW8BIT, ADAMW, "),
        ("optim=no_yaml", "while parsing a flow node"),
        ("optim=no_mapping", "In 'optim/no_mapping': "),
        ("optim=interpolation", "optim.lr: Interpolation key 'trainer.nope' not found"),
        ("optim=min", "optim=min does not exist; did you mean optim=mine?"),
        ("experiment=stranger", "experiment/stranger.yaml: wibble is not an option"),
        ("experiment=missing", "In 'train': Could not find 'optim/nope'"),
        ("+cluster=no_package", "cluster/no_package.yaml: cluster is not an option; begin the file with '# @package"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_or_the_key(own: Path, override: str, problem: str) -> None:
    (found,) = problems_of(override, config_dir=str(own))
    assert found.startswith(problem)


# -- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "combinations"),
    [
        ([], [[]]),
        (["seed=3"], [["seed=3"]]),
        (
            ["optim=adamw8bit,adamw", "seed=0,1", "model=3m"],
            [
                ["optim=adamw8bit", "seed=0", "model=3m"],
                ["optim=adamw8bit", "seed=1", "model=3m"],
                ["optim=adamw", "seed=0", "model=3m"],
                ["optim=adamw", "seed=1", "model=3m"],
            ],
        ),
        (["seed=range(0,3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
        (["parallel=glob(zero*,exclude=[zero0,zero3])"], [["parallel=zero1"], ["parallel=zero2"]]),
        (["parallel.precision=fp32,bf16"], [["parallel.precision=FP32"], ["parallel.precision=BF16"]]),
    ],
)
def test_a_sweep_is_every_combination(overrides: list[str], combinations: list[list[str]]) -> None:
    assert expand(overrides) == combinations


def test_values_with_commas_and_blanks_survive_a_sweep() -> None:
    prompts = [compose_config(words).trainer.prompt for words in expand(["trainer.prompt=choice('a,b','c d')"])]
    assert prompts == ["a,b", "c d"]


def test_a_glob_finds_own_options(own: Path) -> None:
    assert expand(["optim=glob(m*)"], str(own)) == [["optim=mine"]]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed=1,x", "seed=x must be a whole number"),
        ("optim=adamw,q", "optim=q does not exist"),
        ("optim=glob(z*)", f"optim=glob(z*) matches nothing; there are {OPTIMIZERS}"),
        ("optim.lr=interval(0,1)", "optim.lr=interval(0,1): an interval has no end of values"),
    ],
)
def test_a_mistake_in_one_combination_refuses_the_sweep(override: str, problem: str) -> None:
    (found,) = _problems(lambda: expand([override, "seed=0,1"] if "seed" not in override else [override]))
    assert found.startswith(problem)


def test_an_interval_is_left_to_those_who_can_choose_from_it() -> None:
    assert expand(["optim.lr=interval(0,1)", "seed=0,1"], with_intervals=True) == [["seed=0"], ["seed=1"]]


# -- Hydra's own main -------------------------------------------------------------------------------------------------


def test_a_launcher_of_hydra_runs_every_job_and_the_worst_code_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[Precision, int, Sequence[str]]] = []

    def job(config: RunConfig, overrides: Sequence[str]) -> int:
        seen.append((config.parallel.precision, config.seed, overrides))
        return 75 if config.seed == 0 else 0

    handlers = list(logging.getLogger().handlers)
    code = hand_over(["-m", "hydra/launcher=basic", "parallel.precision=bf16", "seed=0,1"], job)
    assert code == 75
    assert seen == [
        (Precision.BF16, 0, ["parallel.precision=BF16", "seed=0"]),
        (Precision.BF16, 1, ["parallel.precision=BF16", "seed=1"]),
    ]
    assert logging.getLogger().handlers == handlers
    assert [path.name for path in tmp_path.iterdir()] == ["home"]  # no outputs/, no multirun/ where the user is
    capfd.readouterr()


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--help"], ["holdfast train [GROUP=OPTION ...]", *(f"{group}: " for group in GROUPS)]),
        (["--hydra-help"], ["--shell-completion"]),
        (["--cfg", "hydra"], ["sweep:"]),
        (["-sc", "install=bash"], ["complete"]),
    ],
)
def test_hydra_answers_for_itself(
    words: list[str], fragments: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # --hydra-help prints through a handler of its own
    monkeypatch.setattr(root, "level", root.level)
    assert hand_over(words) == 0
    shown: Any = capfd.readouterr().out
    assert all(fragment in shown for fragment in fragments)
