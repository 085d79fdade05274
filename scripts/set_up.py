"""Make .venv, the environment `make` works in, or bring it up to date. Needs Python's standard library only.

torch comes first, so that DeepSpeed does not choose one. A torch that the calling Python has already is the user's own
build, most often for a particular GPU: .venv then looks through to it, and nothing may replace it.
"""

import platform
import sys

if sys.version_info < (3, 10):  # noqa: UP036  # it is for the interpreters that are too old
    sys.exit(
        f"Python {platform.python_version()} at {sys.executable} is too old: 3.10 or newer is needed. "
        "Name another one: make PYTHON=python3.12"
    )

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP, LOG = VENV / "stamp", VENV / "set_up.log"
INPUTS = (ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "setup.py", Path(__file__).resolve())
PACKAGE = ROOT / "holdfast"
KERNELS = (
    PACKAGE / "native_build.py",
    *sorted(PACKAGE.glob("*/build_kernels.py")),
    *sorted(PACKAGE.glob("**/kernels/*.[ch]*")),
)
WITHOUT_KERNELS = {
    "optim": "the optimizer takes plain torch operations on CPUs",
    "fault_tolerance": "snapshots are copied by NumPy",
}
"""What happens instead, by the part of the package that has kernels."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDS_GB = {"own torch": 2, "CPU build": 3, "CUDA build": 10}
BUILD_TOOLS = ("setuptools>=77", "wheel")
COMMANDS = ("ruff", "import-linter")
"""Tools that are called by their command, which has to be in .venv even where the package itself is seen through it."""

ENVIRONMENT = os.environ | {
    "DS_ACCELERATOR": "cpu",  # else DeepSpeed's set-up wants nvcc wherever torch is a CUDA build
    "DS_BUILD_OPS": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
}
REASONS = {
    r"No space left on device": "the disk is full (TMPDIR says where pip unpacks)",
    r"Name resolution|name resolution|NewConnection|Network is unreachable|ConnectTimeout|ProxyError|versions: none":
        "the package index cannot be reached; behind a proxy or a mirror, set HTTPS_PROXY or PIP_INDEX_URL",
    r"command '.*(cc|c\+\+|clang)' failed|No such file or directory: '.*cc'": "a C compiler is needed for this Python",
}  # fmt: skip


class OwnTorch(NamedTuple):
    """The torch of the Python that runs this script."""

    version: str
    requires: frozenset[str]
    """Names of the packages it needs; their versions are its own business."""


def main() -> None:
    """Do what is missing; nothing when nothing is."""
    if Path(sys.prefix).resolve() == VENV.resolve():  # .venv is active; it must not be made out of itself
        maker = read_stamp().get("python", sys._base_executable)
        os.execv(maker, [maker, __file__])
    directory = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)  # two makes at once
    own = own_torch()
    have, want = read_stamp(), stamp_for(own)
    if have != want:
        if have.get("base") != want["base"]:
            create_venv(own)
        STAMP.unlink(missing_ok=True)
        build_kernels()
        if {**have, "kernels": want["kernels"]} != want:
            install(own)
        STAMP.write_text(json.dumps(want))
    STAMP.touch()


def stamp_for(own: OwnTorch | None) -> dict[str, str]:
    """What .venv depends on: another base needs a new one, other inputs only another installation."""
    torch = f"own torch {own.version}" if own else "pinned torch"
    return {
        "base": f"Python {platform.python_version()} at {sys.prefix}, {torch}, for {ROOT}",
        "python": sys.executable,
        "inputs": digest(INPUTS),
        "kernels": digest(KERNELS),
    }


def digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def read_stamp() -> dict[str, str]:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def own_torch() -> OwnTorch | None:
    """The torch of the calling Python if it can be imported and is in the range of pyproject.toml."""
    try:
        version = importlib.metadata.version("torch")
        import torch  # noqa: F401  # installed is not enough: its libraries may be missing
    except (ImportError, OSError) as error:
        if not isinstance(error, importlib.metadata.PackageNotFoundError):
            say(f"the torch of {sys.executable} cannot be imported ({error}): .venv gets its own")
        return None
    wanted = re.search(r'"torch>=([\d.]+),<([\d.]+)"', INPUTS[0].read_text())
    if not wanted or not numbers(wanted[1]) <= numbers(version) < numbers(wanted[2]):
        say(f"torch {version} of {sys.executable} is outside the range of pyproject.toml: .venv gets its own")
        return None
    names = [re.split(r"[^\w.-]", line)[0] for line in importlib.metadata.requires("torch") or []]
    return OwnTorch(version, frozenset(map(normalised, names)))


def create_venv(own: OwnTorch | None) -> None:
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        fail(f"{sys.executable} has no venv module; on Debian and Ubuntu it is the package python3-venv")
    if VENV.exists():
        say("making .venv anew: it is incomplete or for another Python or torch")
    options = ["--system-site-packages"] if own else []
    subprocess.run([sys.executable, "-m", "venv", "--clear", *options, str(VENV)], check=True)
    if own and sys.prefix != sys.base_prefix:  # an active venv: the new one sees only the Python below both
        (site,) = VENV.glob("lib/python*/site-packages")
        (site / "own_torch.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")


def install(own: OwnTorch | None) -> None:
    """torch, then everything pinned and the package itself, in editable mode. Exits with a reason when it cannot."""
    LOG.write_text("")
    constraints = write_constraints(own)
    if own:
        say(f"keeping torch {own.version} of {sys.executable}")
        require_space("own torch")
        pip("build tools", "-c", constraints, f"torch=={own.version}", *BUILD_TOOLS)
    else:
        install_torch(constraints)
    pip("dependencies", "-c", constraints, "--no-build-isolation", "-e", f"{ROOT}[dev]")
    if own:
        pip("commands", "-c", constraints, "--ignore-installed", "--no-deps", *COMMANDS)
    check_torch(own)


def build_kernels() -> None:
    """Before pip, which would hide what the compiler says; pip then finds them built."""
    for part, instead in WITHOUT_KERNELS.items():
        say(f"kernels of holdfast.{part} ...")
        built = subprocess.run([sys.executable, "-m", f"holdfast.{part}.build_kernels"], cwd=ROOT)
        if built.returncode:
            if os.environ.get("HOLDFAST_REQUIRE_KERNELS") == "1":
                fail(f"HOLDFAST_REQUIRE_KERNELS=1, but the kernels of holdfast.{part} cannot be built")
            say(f"going on without: {instead}, slower, with the same results")


def write_constraints(own: OwnTorch | None) -> str:
    """The pins to use: those of constraints.txt, but own torch as it is and what it requires as it likes."""
    lines = INPUTS[1].read_text().splitlines()
    if own:
        free = own.requires | {"torch"}
        lines = [line for line in lines if normalised(line.split("==")[0]) not in free]
        lines.append(f"torch=={own.version}")
    path = VENV / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def install_torch(constraints: str) -> None:
    """The pinned torch: the CPU build where there is no NVIDIA GPU and a CPU build can be found."""
    pin = re.search(r"^torch==(\S+)$", INPUTS[1].read_text(), re.MULTILINE)[1]
    rest = ("-c", constraints, *BUILD_TOOLS)
    if not has_gpu():
        require_space("CPU build")
        index = ["--extra-index-url", CPU_INDEX] if answers(CPU_INDEX) else []
        what = f"torch {pin}, CPU build"
        if pip(what, *index, f"torch=={pin}+cpu", *rest, may_fail=True):
            return
        if known_reason():
            explain_failure(what)
        say("no CPU build of torch found; taking the standard one, which works too but is several GB larger")
    require_space("CUDA build")
    pip(f"torch {pin}", f"torch=={pin}", *rest)


def check_torch(own: OwnTorch | None) -> None:
    code = "import torch, holdfast; from importlib.metadata import version; print(version('torch'))"
    result = subprocess.run([python(), "-c", code], cwd=VENV, capture_output=True, text=True)
    found = result.stdout.strip()
    if result.returncode:
        fail(f"the new .venv does not work:\n{result.stderr}")
    if own and found != own.version:
        fail(f"torch {own.version} was to be kept, but .venv has {found}; remove .venv and report this")
    say(f"ready: Python {platform.python_version()}, torch {found}")


def pip(what: str, *args: str, may_fail: bool = False) -> bool:
    """Install. The terminal gets one line; pip's own words are in the log."""
    print(f"set-up: {what} ...", end="", flush=True)
    start = time.monotonic()
    command = [python(), "-m", "pip", "install", "--progress-bar", "off", *args]
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        code = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f" {'done' if code == 0 else 'failed'} after {time.monotonic() - start:.0f} s", flush=True)
    if code and not may_fail:
        explain_failure(what)
    return code == 0


def explain_failure(what: str) -> None:
    reason = known_reason() or "these are its last words"
    if not known_reason():
        lines = [line for line in last_output().splitlines() if line.strip() and not line.startswith("WARNING")]
        print("\n".join(lines[-12:]), file=sys.stderr)
    fail(f"pip could not install the {what}: {reason}. All of its output: {LOG}")


def known_reason() -> str | None:
    return next((reason for pattern, reason in REASONS.items() if re.search(pattern, last_output())), None)


def last_output() -> str:
    return LOG.read_text().rpartition("\n$ ")[2]


def require_space(build: str) -> None:
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < NEEDS_GB[build]:
        fail(f"{ROOT} has {free_gb:.1f} GB free; .venv with the {build} of torch takes {NEEDS_GB[build]} GB")


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True).stdout if tool else ""
    return "GPU" in listed or Path("/dev/nvidia0").exists()


def answers(url: str) -> bool:
    """Asked once and briefly: without it pip would retry for a minute on a machine that reaches only a mirror."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except OSError:
        return False


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> Sequence[int]:
    """The release part of a version, for comparing."""
    return [int(part) for part in re.match(r"[\d.]*\d", version)[0].split(".")]


def python() -> str:
    return str(VENV / "bin" / "python")


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"set-up failed: {text}")


if __name__ == "__main__":
    main()
