"""``holdfast submit``: check what a Ray job would stumble over, run it, watch it, end with its driver's exit code.

Sugar for ``ray job submit``, whose exact line is printed before anything is sent.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast import knobs
from holdfast.errors import ConfigurationError
from holdfast.launch.arguments import Parser
from holdfast.launch.follow_job import Watched, exit_code_in, follow_job
from holdfast.launch.planned_job import plan_job, run_record
from holdfast.launch.upload import SHIPPED, RuntimeEnv, read_runtime_env, shadowing_names, size_problems

if TYPE_CHECKING:
    from holdfast.launch.ray_jobs import JobState, RayJobs

__all__ = ["submit", "submit_line"]

_SAVED, _NOT_SAVED, _DETACHED = 75, 143, 130


def submit(words: Sequence[str]) -> int:
    """Do what the command line ``words`` says; the driver's exit code. Raises: ConfigurationError with all problems."""
    own, job = _split(words)
    parser = _parser()
    args = parser.parse_args(own)
    if args.help:
        sys.stdout.write(parser.format_help())
        return 0
    if args.print_runtime_env:
        sys.stdout.write(SHIPPED.read_text())
        return 0
    address = args.address or knobs.ray_dashboard() or "http://127.0.0.1:8265"
    if args.attach or args.stop:
        return _look_after(args, job, address)
    return _submit(args, job, address)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those of the job behind ``--``."""
    own, job = list(words), list[str]()
    if "--" in own:
        cut = own.index("--")
        own, job = own[:cut], own[cut + 1 :]
    return own, job


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast submit",
        add_help=False,
        allow_abbrev=False,
        usage="holdfast submit [OPTIONS] -- train KEY=VALUE ...\n"
        "       holdfast submit [--address URL] --attach ID | --stop ID",
        description="Runs holdfast train as a Ray job. Ctrl-C stops the job after it has saved itself; a second one "
        "leaves it alone. The exit code is the driver's.",
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this and exit")
    parser.add_argument(
        "--address", metavar="URL", help="dashboard of the cluster (RAY_API_SERVER_ADDRESS, else this host)"
    )
    parser.add_argument(
        "--runtime-env", metavar="FILE", type=Path, help="what to upload and set; else the one that comes with Holdfast"
    )
    parser.add_argument("--print-runtime-env", action="store_true", help="print that one, to begin your own with")
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--dry-run", action="store_true", help="check and print, send nothing; no cluster is needed")
    parser.add_argument("--attach", metavar="ID", help="follow a job that runs, and end with its exit code")
    parser.add_argument("--stop", metavar="ID", help="stop a job after it has saved itself, and wait for that")
    return parser


# -- a new job --------------------------------------------------------------------------------------------------------


def _submit(args: argparse.Namespace, words: Sequence[str], address: str) -> int:
    environment = read_runtime_env(args.runtime_env)
    planned, problems, warnings = plan_job(words, environment)
    from holdfast.launch.ray_jobs import RayJobs  # importing ray takes a second

    problems += _upload_problems(environment)
    if problems:
        raise ConfigurationError(problems)
    assert planned is not None, "or there would be a problem"
    for warning in [*environment.warnings(), *warnings]:
        _tell(f"warning: {warning}")
    jobs = None if args.dry_run else RayJobs(address)
    submission_id = planned.submission_id(() if jobs is None else jobs.ids())
    _tell(submit_line(address, environment, submission_id, planned.words))
    if jobs is None:
        return 0
    jobs.submit(shlex.join(planned.words), submission_id, _absolute(environment), planned.about)
    if args.no_wait:
        _tell(f"{submission_id} is accepted; {_attach(address, submission_id)}")
        return 0
    return _watch(jobs, address, submission_id)


def _absolute(environment: RuntimeEnv) -> Mapping[str, object]:
    folder = environment.working_dir
    return environment.plain if folder is None else {**environment.plain, "working_dir": str(folder)}


def _upload_problems(environment: RuntimeEnv) -> list[str]:
    from holdfast.launch.ray_jobs import UPLOAD_LIMIT_BYTES, uploaded_files

    folder = environment.working_dir
    if folder is None or not folder.is_dir():
        return []
    files = uploaded_files(folder, environment.excludes)
    return size_problems(files, limit_bytes=UPLOAD_LIMIT_BYTES, folder=folder) + [
        f"working_dir={folder} has {name}, which every worker would import instead of Python's own module of that name "
        "and die; rename it, or name it under excludes"
        for name in shadowing_names(files)
    ]


def submit_line(address: str, environment: RuntimeEnv, submission_id: str, entrypoint: Sequence[str]) -> str:
    """The same without ``holdfast submit``: a line for a shell."""
    words = ["ray", "job", "submit", "--address", address, "--runtime-env", str(environment.source)]
    return shlex.join([*words, "--submission-id", submission_id, "--", *entrypoint])


# -- a job that there is ----------------------------------------------------------------------------------------------


def _look_after(args: argparse.Namespace, job: Sequence[str], address: str) -> int:
    if job or (args.attach and args.stop):
        raise ConfigurationError(
            "--attach ID and --stop ID are about one job that exists; give one of them and no command"
        )
    from holdfast.launch.ray_jobs import RayJobs

    jobs, submission_id = RayJobs(address), args.attach or args.stop
    if args.stop:
        if not jobs.state(submission_id).is_over:
            _tell(f"stopping {submission_id}: it saves itself and ends")
            jobs.stop(submission_id)
        if args.no_wait:
            return 0
    return _watch(jobs, address, submission_id)


def _watch(jobs: RayJobs, address: str, submission_id: str) -> int:
    watched = follow_job(jobs, submission_id)
    if watched.is_forgotten:
        _tell(f"{submission_id}: {watched.why}; a run that was not finished goes on with the same command")
        return 1
    if watched.state is None:
        _tell(f"{watched.why}; {_attach(address, submission_id)}")
        return _DETACHED
    code = _exit_code(watched, jobs.state(submission_id), submission_id)
    _tell(f"{submission_id}: {watched.state.status}, exit code {code}{_advice(code)}")
    return code


def _exit_code(watched: Watched, state: JobState, submission_id: str) -> int:
    """Ray knows the driver's exit code unless the job was stopped; then run.json has it, if it can be seen from here,
    and the last line of the log otherwise."""
    if state.exit_code is not None:
        return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code  # killed by a signal, as in a shell
    record = run_record(state.metadata, submission_id)
    noted = record if record is not None else exit_code_in(watched.said)
    if noted is not None:
        return noted
    if state.message:
        _tell(state.message)
    return _NOT_SAVED if state.status == "STOPPED" else 1


def _advice(code: int) -> str:
    return "; saved: the same command goes on from there" if code == _SAVED else ""


def _attach(address: str, submission_id: str) -> str:
    return f"holdfast submit --address {address} --attach {submission_id} follows it, --stop {submission_id} stops it"


def _tell(message: str) -> None:
    sys.stderr.write(f"submit: {message}\n")
