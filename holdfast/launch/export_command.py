"""``holdfast export``: what a run has trained, as a folder that other tools open."""

from __future__ import annotations

import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.shards import StorageShards
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.checkpoint_export import export_checkpoint
from holdfast.launch.checkpoint_place import place_of_run
from holdfast.launch.find_run import find_run
from holdfast.launch.model_card import model_card
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_options import section
from holdfast.trainer.config import AdapterConfig, DataConfig, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["export_command"]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export_command(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code. Raises: ConfigurationError for what cannot be exported."""
    args = _parser().parse_args(list(words))
    run = find_run(args.run, args.root)
    trained = _Trained(run, args.step)
    target = Path(args.output).expanduser().absolute() if args.output else run.export / args.to
    try:
        with _new_folder(target) as folder:
            _FORMS[args.to](trained, folder, args.dtype)
    except SnapshotError as error:  # damage
        raise ConfigurationError(str(error)) from error
    sys.stdout.write(f"{args.to}: {target} ({trained.words})\n")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast export",
        allow_abbrev=False,
        description="Writes what a run has trained as a folder for other tools: hf is a model that transformers opens, "
        "with configuration, tokenizer and model card; peft is a LoRA alone. Changes nothing in the run.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run; the newest run if left out")
    parser.add_argument("--to", required=True, choices=sorted(_FORMS), help="form of the folder")
    parser.add_argument(
        "--output", metavar="DIR", help="the folder, which must not exist; <run>/export/<form> if left out"
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32", help="of the weights; fp32 if left out")
    parser.add_argument("--step", type=int, metavar="N", help="of this checkpoint; what the run ended with if left out")
    add_root(parser)
    return parser


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Written beside ``target``, which it becomes when everything has gone well. Raises: ConfigurationError."""
    if target.exists():
        raise ConfigurationError(f"{target} exists already; choose another --output, or remove it")
    folder = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.replace(target)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written: {error.strerror or error}; choose another --output"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- what a run has trained -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Trained:
    """A run, and which of its states is meant."""

    run: RunDir
    step: int | None
    words: str = ""

    @property
    def _values(self) -> Mapping[str, object]:
        return read_yaml(self.run.config_file)

    @property
    def model(self) -> ModelConfig:
        return section(self._values, "model", ModelConfig)

    @property
    def data(self) -> DataConfig:
        return section(self._values, "data", DataConfig)

    @property
    def adapter(self) -> AdapterConfig:
        return section(self._values, "adapter", AdapterConfig)

    def weights(self) -> dict[str, Tensor]:
        """Whole, fp32, by the run's own names. Raises: ConfigurationError, SnapshotError."""
        exported = self.run.export / "model.safetensors"
        if self.step is None and exported.is_file():
            return self._read(exported)
        place = place_of_run(self.run)
        step = place.chosen(self.step)
        with tempfile.TemporaryDirectory(prefix="holdfast-export-") as folder:
            path = Path(folder, "model.safetensors")
            export_checkpoint(StorageShards(place.storage, checkpoint.directory(step)), path, step=step)
            return self._read(path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                self.words = f"weights of step {(file.metadata() or {}).get('step', '?')}"
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error

    def adapted(self) -> nn.Module:
        """The base of an adapter run with all tasks up to its own. Raises: ConfigurationError, SnapshotError."""
        from holdfast.trainer.adapting import adapted_base

        folder = self.run.export / "adapter"
        if self.step is not None or not folder.is_dir():
            raise ConfigurationError(
                f"run {self.run.run_id} trains an adapter, which is exported when the run has finished; "
                + ("leave out --step" if folder.is_dir() else "it has not yet")
            )
        self.words = f"task {self.adapter.task}"
        config = replace(self.adapter, tasks=[*self.adapter.tasks, str(folder)], task="")
        return adapted_base(config, self.model)


# -- the forms --------------------------------------------------------------------------------------------------------


def _to_hf(trained: _Trained, folder: Path, dtype: str) -> None:
    import torch

    from holdfast.trainer.hf_export import portable, write_folder

    weights = _merged(trained) if trained.adapter.method else trained.weights()
    number: torch.dtype = getattr(torch, _DTYPES[dtype])
    model = portable(trained.model, weights)
    write_folder(folder, model, trained.model, trained.data, number)
    count = sum(parameter.numel() for parameter in model.parameters())
    (folder / "README.md").write_text(model_card(trained.run, trained.words, type(model).__name__, count, dtype))


def _merged(trained: _Trained) -> dict[str, Tensor]:
    """Base and tasks as the weights of one ordinary model. Raises: ConfigurationError where the method has none."""
    from holdfast import adapters

    model = trained.adapted()
    model.load_state_dict(adapters.merge(model), strict=False)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _to_peft(trained: _Trained, folder: Path, dtype: str) -> None:
    from holdfast.trainer.peft_export import write_peft

    if not trained.adapter.method:
        raise ConfigurationError(f"run {trained.run.run_id} has trained a whole model and no adapter; use --to hf")
    if dtype != "fp32":
        raise ConfigurationError(f"--dtype {dtype} is of --to hf; a LoRA keeps the numbers that were trained")
    write_peft(trained.adapted(), trained.model, folder)


_FORMS: Mapping[str, Callable[[_Trained, Path, str], None]] = {"hf": _to_hf, "peft": _to_peft}
