"""The console command: messages, exit codes, and nothing heavy before it is needed."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml  # type: ignore[import-untyped]  # comes with OmegaConf, its stubs do not

from holdfast import __version__
from holdfast.configs.options import kinds
from holdfast.configs.plain import from_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, RecoveryFailed
from holdfast.launch.cli import main


@dataclass
class FakeRun:
    """Stands for what trains: notes what it is asked for and ends as it is told."""

    endings: list[int | BaseException] = field(default_factory=list)
    """How each run ends, in order; the ones not listed finish."""
    configs: list[RunConfig] = field(default_factory=list)
    overrides: list[list[str]] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def run(self, config: RunConfig, *, overrides: Sequence[str], command: Sequence[str]) -> SimpleNamespace:
        self.configs.append(config)
        self.overrides.append(list(overrides))
        self.commands.append(list(command))
        ending = self.endings[len(self.configs) - 1] if len(self.configs) <= len(self.endings) else 0
        if isinstance(ending, BaseException):
            raise ending
        return SimpleNamespace(exit_code=ending)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRun:
    found, module = FakeRun(), ModuleType("holdfast.launch.run")
    module.run = found.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "holdfast.launch.run", module)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return found


# -- without a run ----------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, does in (("train", "train a language model"), ("checkpoint", "list and verify the checkpoints")):
        assert re.search(rf"\n  {name} +{does}", said)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"holdfast {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from holdfast.launch.cli import main; main(sys.argv[1:]); "
        "print({'torch', 'hydra', 'ray', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "holdfast", "trian"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'trian' is no command; did you mean train?\n"


_COMMANDS = (
    "demo, train, adapt, status, events, report, watch, plan, checkpoint, submit, doctor, export, inject, wandb-sync, "
    "dashboards"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], f"a command is missing; choose one of {_COMMANDS}, or see holdfast --help"),
        (["wibble"], f"'wibble' is no command; choose one of {_COMMANDS}"),
        (["optim.lr=3"], "'optim.lr=3' is no command; did you mean holdfast train optim.lr=3?"),
        (["train", "--wibble"], "unrecognized arguments: --wibble; see holdfast train --help"),
        (["train", "--cfg"], "argument --cfg/-c: expected one argument; see holdfast train --help"),
        (["train", "-m", "--cfg", "job"], "--multirun runs every combination; leave it out to look at one"),
        (["train", "optt.lr=3"], "optt.lr is not an option; did you mean optim.lr?"),
        (["train", "--help", "optt.lr=3"], "optt.lr is not an option; did you mean optim.lr?"),
    ],
)
def test_bad_arguments_are_told_in_one_line_and_exit_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], fake: FakeRun
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert fake.configs == []


def test_each_problem_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "optt.lr=3", "seed=x", "--cfg", "job"]) == 2
    assert capsys.readouterr().err == (
        "error: optt.lr is not an option; did you mean optim.lr?\nerror: seed=x must be a whole number\n"
    )


# -- --cfg job --------------------------------------------------------------------------------------------------------


def _keys(section: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_cfg_job_is_yaml_with_every_key(capsys: pytest.CaptureFixture[str], fake: FakeRun) -> None:
    words = ["experiment=main_job", "trainer.prompt='a: \"b\" # c'", "optim.eps=1e-08"]
    assert main(["train", *words, "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert list(_keys(shown)) == list(kinds())
    config = from_plain(shown)
    assert (config.trainer.prompt, config.optim.eps) == ('a: "b" # c', 1e-8)
    assert config.chaos.faults == ["sigkill rank=1 step=150"]
    assert fake.configs == []


def test_flags_may_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text("lr: 0.5\n")
    for words in (
        ["--cfg", "job", "-cd", str(tmp_path), "optim=mine"],
        ["optim=mine", f"--config-dir={tmp_path}", "-c", "job"],
    ):
        assert main(["train", *words]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 0.5


# -- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_gets_its_configuration_overrides_and_command(fake: FakeRun, tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    assert main(["train", "optim=adamw", "seed=3"]) == 0
    assert fake.configs[0].seed == 3
    assert fake.overrides == [["optim=adamw", "seed=3"]]
    assert fake.commands == [["holdfast", "train", "optim=adamw", "seed=3"]]
    assert list(tmp_path.iterdir()) == []  # Hydra leaves no folder behind
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("code", [0, 1, 75, 93, 130, 143])
def test_the_exit_code_is_that_of_the_run(fake: FakeRun, code: int) -> None:
    fake.endings = [code]
    assert main(["train"]) == code


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        (ConfigurationError(["one thing", "another"]), 2, "error: one thing\nerror: another\n"),
        (RecoveryFailed("three restarts without a step", exit_code=93), 93, "error: three restarts without a step\n"),
        (RecoveryFailed("the budget is used up"), 1, "error: the budget is used up\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_run_raises_becomes_a_message_and_a_code(
    fake: FakeRun, capsys: pytest.CaptureFixture[str], ending: BaseException, code: int, message: str
) -> None:
    fake.endings = [ending]
    assert main(["train"]) == code
    assert capsys.readouterr().err == message


def test_an_unexpected_error_shows_where_it_came_from(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    fake.endings = [ZeroDivisionError("oh")]
    assert main(["train"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("ZeroDivisionError: oh\n")


# -- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_combination_in_order(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "optim=adamw8bit,adamw", "seed=0,1"]) == 0
    assert [(c.optim.name.name, c.seed) for c in fake.configs] == [
        ("ADAMW8BIT", 0),
        ("ADAMW8BIT", 1),
        ("ADAMW", 0),
        ("ADAMW", 1),
    ]
    assert fake.overrides[2] == ["optim=adamw", "seed=0"]
    assert capsys.readouterr().err.splitlines()[2] == "run 3 of 4: optim=adamw seed=0"


def test_a_sweep_goes_on_after_a_failure_and_ends_with_the_worst_code(
    fake: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.endings = [1, RecoveryFailed("no", exit_code=93), ValueError("oh"), 0]
    assert main(["train", "--multirun", "seed=0,1,2,3"]) == 93
    assert len(fake.configs) == 4
    assert "ValueError: oh" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [75, 130, 143, KeyboardInterrupt()])
def test_a_stop_ends_the_whole_sweep(fake: FakeRun, ending: int | BaseException) -> None:
    fake.endings = [0, ending]
    assert main(["train", "-m", "seed=0,1,2"]) == (ending if isinstance(ending, int) else 130)
    assert len(fake.configs) == 2


def test_one_bad_combination_refuses_the_sweep_before_the_first_run(
    fake: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", "trainer.global_batch=24,25", "seed=0,1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trainer.global_batch=25 must be a multiple of")
    assert fake.configs == []


@pytest.mark.parametrize("name", ["run_id=mine", "resume=mine"])
def test_a_name_for_one_run_does_not_name_a_sweep(fake: FakeRun, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["train", "-m", "seed=0,1", name]) == 2
    assert capsys.readouterr().err == "error: run mine cannot be 2 runs of a sweep; leave out run_id and resume\n"
    assert main(["train", "-m", "seed=0", name]) == 0


def test_a_launcher_of_hydra_starts_the_runs(fake: FakeRun, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fake.endings = [0, 93]
    assert main(["train", "-m", "hydra/launcher=basic", "seed=0,1"]) == 93
    assert [config.seed for config in fake.configs] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert main(["train", "-m", "hydra/launcher=basic", "sead=0,1"]) == 2
    assert "did you mean seed?" in capfd.readouterr().err


# -- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("holdfast", _COMMANDS.replace(",", "")),
        ("holdfast tr", _COMMANDS.replace(",", "")),  # the shell chooses
        ("holdfast train optim=adamw", "optim=adamw optim=adamw8bit"),
        ("holdfast train seed=1 trainer.max_s", "trainer.max_steps="),
        ("holdfast plan trainer.max", ""),  # nothing of train's, so that the shell completes names of files
        ("holdfast checkpoint list ", ""),
        ("holdfast inject ", ""),
    ],
)
def test_the_shell_completes_commands_and_options(
    line: str, choices: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert capfd.readouterr().out.split() == choices.split()


@pytest.mark.parametrize("words", [["-sc", "install=bash"], ["train", "-sc", "install=bash"]])
def test_the_shell_learns_how_to_ask(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "complete -o nospace -o default -F hydra_bash_completion holdfast" in capfd.readouterr().out
