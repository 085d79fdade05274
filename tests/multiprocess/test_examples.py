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


def _run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=55, env=environment, check=False
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


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_shards_the_state(stage: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_WITHOUT_COMPILING)
    output = _launch(str(script), str(_EXAMPLES / "adamw8bit_deepspeed.py"), "--stage", stage, "--steps", "10")
    assert f"ZeRO {stage}: loss" in output and "state on this rank: 1.03 bytes per parameter" in output
