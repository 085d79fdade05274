"""The recipes: their form against schemas, their scripts against programs that record what they are asked, and every
training in them against our own command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema  # comes with Ray
import pytest
import yaml

from holdfast.configs import validate
from holdfast.configs.schema import RunConfig
from holdfast.launch.compose import compose_config
from tests.support.recipe_schemas import RAY_JOB, SKYPILOT

_RECIPES = Path(__file__).parents[2] / "recipes"


def _checked(command: list[str]) -> RunConfig:
    """What the words behind ``holdfast train`` mean; a start would not refuse them."""
    assert command[:2] == ["holdfast", "train"]
    config = compose_config(command[2:])
    assert validate.check(config, validate.Host(1 << 50, "a cluster")) == []
    return config


def _yaml(name: str, schema: dict[str, Any]) -> Any:
    found = yaml.safe_load((_RECIPES / name).read_text())
    jsonschema.validate(found, schema)
    return found


# -- KubeRay ----------------------------------------------------------------------------------------------------------


def test_the_ray_job_is_of_the_right_form_and_its_parts_fit_each_other() -> None:
    spec = _yaml("rayjob.yaml", RAY_JOB)["spec"]
    config = _checked(shlex.split(spec["entrypoint"]))
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["replicas"] == workers["minReplicas"] == config.launch.nodes
    assert config.run_id, "a retry is a new cluster, which finds the run by its name"
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert "persistentVolumeClaim" in volumes[mounted[config.root]]
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert pod["terminationGracePeriodSeconds"] > config.recovery.stop_grace_s
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == config.launch.workers_per_node * config.launch.gpus_per_worker
    assert int(limits["memory"].removesuffix("Gi")) > 2 * config.snapshot.memory_limit_gb
    wait_s = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert isinstance(wait_s, str) and int(wait_s) > config.recovery.stop_grace_s
    assert (spec["submissionMode"], spec["submitterConfig"]["backoffLimit"]) == ("HTTPMode", 0)
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]


def test_a_misspelled_field_would_be_found() -> None:
    recipe = yaml.safe_load((_RECIPES / "rayjob.yaml").read_text())
    recipe["spec"]["backofLimit"] = recipe["spec"].pop("backoffLimit")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, RAY_JOB)


# -- SkyPilot ---------------------------------------------------------------------------------------------------------


def test_the_skypilot_task_is_of_the_right_form_and_starts_again_after_what_may_be_continued() -> None:
    task = _yaml("skypilot.yaml", SKYPILOT)
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 143]
    given = {"SKYPILOT_NUM_NODES": str(task["num_nodes"]), "HEAD": "10.0.0.1", **task["envs"]}
    script = task["run"].replace("\\\n", " ")
    (line,) = [line for line in script.splitlines() if line.strip().startswith("holdfast train")]
    known = re.sub(r"\$(\w+)", lambda name: given[name[1]], line)
    config = _checked(shlex.split(known))
    accelerator, _, count = task["resources"]["accelerators"].partition(":")
    assert (config.launch.nodes, config.run_id) == (task["num_nodes"], task["envs"]["RUN_ID"])
    assert accelerator and int(count) == config.launch.workers_per_node
    assert config.root in task["setup"]


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_scripts_in_it_are_scripts(part: str) -> None:
    subprocess.run(
        ["bash", "-n"], input=yaml.safe_load((_RECIPES / "skypilot.yaml").read_text())[part], text=True, check=True
    )


# -- SLURM ------------------------------------------------------------------------------------------------------------

_SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
"$@"
"""
_SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
[ "$1" = show ] && printf 'node1\\nnode2\\nnode3\\nnode4\\n'
exit 0
"""
_RAY = """#!/usr/bin/env python3
import json, os, pathlib, signal, sys
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(["ray", *sys.argv[1:]]) + "\\n")
words = sys.argv[sys.argv.index("--") + 1 :]
options = dict(word.split("=", 1) for word in words if "=" in word)
run = pathlib.Path(options["root"], options["project"], options["run_id"])
scenario = os.environ["SCENARIO"]
if scenario == "ray does not start":
    sys.exit(0)  # as ray symmetric-run does
code = {"finished": 0, "verdict": 93}.get(scenario, 75)
if scenario == "time is over":
    signal.signal(signal.SIGUSR1, lambda *_: None)
    run.mkdir(parents=True)
    (run / "driver.lock").write_text(json.dumps({"pid": os.getpid(), "host": "node1"}))
    signal.pause()
    with open(os.environ["LOG"], "a") as log:
        log.write("driver told\\n")
run.mkdir(parents=True, exist_ok=True)
(run / "run.json").write_text(json.dumps({"attempts": [{"ended": {"exit_code": code}}]}))
sys.exit(code)
"""


class Slurm:
    """The batch script with a scheduler and a Ray that only write down what they are asked."""

    def __init__(self, folder: Path, scenario: str) -> None:
        programs, self.log, self.root = folder / "bin", folder / "log", folder / "runs"
        programs.mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("ray", _RAY)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "SCENARIO": scenario,
            "HOLDFAST_HOME": str(self.root),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-4]",
            "SLURM_NNODES": "4",
        }
        self.process = subprocess.Popen(["bash", str(_RECIPES / "slurm.sh"), "seed=3"], env=environment)

    def end(self) -> int:
        return self.process.wait(30)

    def asked(self) -> str:
        return self.log.read_text()


@pytest.mark.parametrize(
    ("scenario", "code", "is_queued_again"),
    [("finished", 0, False), ("verdict", 93, False), ("ray does not start", 1, False), ("stopped", 0, True)],
)
def test_the_batch_script_ends_as_run_json_says(
    tmp_path: Path, scenario: str, code: int, is_queued_again: bool
) -> None:
    slurm = Slurm(tmp_path, scenario)
    assert slurm.end() == code
    assert ("scontrol requeue 4711" in slurm.asked()) == is_queued_again


def test_the_batch_script_passes_usr1_on_to_the_driver_and_queues_the_job_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "time is over")
    lock, end = slurm.root / "holdfast" / "slurm-4711" / "driver.lock", time.monotonic() + 20
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    slurm.process.send_signal(signal.SIGUSR1)
    assert slurm.end() == 0
    assert "driver told" in slurm.asked()
    assert "scontrol requeue 4711" in slurm.asked()


def test_the_batch_script_starts_a_training_that_our_command_line_understands(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "finished")
    slurm.end()
    (started,) = [json.loads(line) for line in slurm.asked().splitlines() if line.startswith("[")]
    cut = started.index("--")
    assert started[:cut] == ["ray", "symmetric-run", "--address", "node1:6379", "--min-nodes", "4"]
    config = _checked(started[cut + 1 :])
    assert (config.run_id, config.launch.nodes, config.seed) == ("slurm-4711", 4, 3)
    directives = re.findall(r"^#SBATCH --(\S+)", (_RECIPES / "slurm.sh").read_text(), re.MULTILINE)
    assert {"signal=B:USR1@300", "requeue", "ntasks-per-node=1", f"nodes={config.launch.nodes}"} <= set(directives)
    assert f"gpus-per-node={config.launch.workers_per_node}" in directives
