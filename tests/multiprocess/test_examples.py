"""The examples run as they are, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parents[2] / "examples"

_WITHOUT_COMPILING = """
import deepspeed, runpy, sys
# DeepSpeed would compile an operation for half a minute, and leave it in the user's cache
deepspeed.ops.__dict__["__compatible_ops__"] = {}
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


_IN_A_NOTEBOOK = """
import asyncio, runpy, sys, threading
sys.argv[0] = sys.argv.pop(1)

async def cell():
    runpy.run_path(sys.argv[0])

thread = threading.Thread(target=asyncio.run, args=(cell(),))
thread.start()
thread.join()
"""


def _run(*command: str, timeout_s: float = 55) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _launch(*command: str) -> str:
    return _run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)


def test_a_plain_loop_resumes_with_the_same_bits() -> None:
    output = _run(str(_EXAMPLES / "adamw8bit.py"))
    assert "state: 2.06 bytes per parameter" in output and "the same bits: True" in output


def test_fsdp2_resumes_with_the_same_bits() -> None:
    output = _launch(str(_EXAMPLES / "adamw8bit_fsdp2.py"))
    assert "2 processes on cpu" in output
    there, here = re.findall(r"ten steps[^:]*: ([0-9.]+)", output)
    assert there == here


@pytest.mark.parametrize("stage", ["1", pytest.param("2", marks=pytest.mark.slow), "3"])
def test_deepspeed_shards_the_state(stage: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_WITHOUT_COMPILING)
    output = _launch(str(script), str(_EXAMPLES / "adamw8bit_deepspeed.py"), "--stage", stage, "--steps", "10")
    assert f"ZeRO {stage}: loss" in output and "state on this rank: 1.03 bytes per parameter" in output


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["a script", pytest.param("a notebook", marks=pytest.mark.slow)])
def test_train_from_python_recovers_and_tells_it(way: str, tmp_path: Path) -> None:
    """The script asks nobody for its name; the notebook runs it beside a loop, in a thread that gets no signals."""
    example = str(_EXAMPLES / "train_from_python.py")
    before = () if way == "a script" else ("-c", _IN_A_NOTEBOOK)
    output = _run(*before, example, str(tmp_path), timeout_s=380)
    assert "Result(finished at step 16, exit code 0" in output
    assert len(re.findall("^recovered in", output, re.MULTILINE)) == 1
    assert Path(re.findall("^checkpoint: (.*)", output, re.MULTILINE)[0]).name == "step-00000016"
    assert Path(re.findall("^weights: (.*)", output, re.MULTILINE)[0]).is_file()


def test_every_example_is_listed_and_run() -> None:
    """own_loop.py is run, and killed, in test_own_loop.py."""
    scripts = {path.name for path in _EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"^- \[(\w+\.py)\]", (_EXAMPLES / "README.md").read_text(), re.MULTILINE))
    run = set(re.findall(r'_EXAMPLES / "(\w+\.py)"', Path(__file__).read_text()))
    assert scripts == listed and scripts - run == {"own_loop.py"}
