"""ZeRO stages 0 to 3: the only door to deepspeed.

DeepSpeed trains; this module builds its engine anew in every membership epoch, shows the sharded state as named
slices, and keeps to the job's grid of quantisation blocks: every parameter starts on a block boundary of its flat
group and every shard ends on one, so that N ranks hold the same codes as one rank would.

Sources: ZeRO, arXiv 1910.02054, sections 5 and 7.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import InvariantViolation
from holdfast.parallel.microbatches import OneByOne
from holdfast.parallel.optimizer_states import OptimizerStates
from holdfast.parallel.sharding import Names, ParamGroups, pad_to_blocks, sharding_of
from holdfast.parallel.slices import Flat, state_slices
from holdfast.types import Precision, StateSlice

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.comm.comm as ds_comm
    import deepspeed.ops
    from deepspeed.runtime.zero import parameter_offload as ds_offload
    from deepspeed.runtime.zero import partition_parameters as ds_partition
    from deepspeed.runtime.zero import stage3 as ds_stage3
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups as ds_groups

__all__ = ["ZeroEngine", "ZeroOptions"]

_PERSISTENT_ELEMENTS = 10_000
"""Stage 3 keeps smaller parameters gathered: norms of any model, no matrix of a real one."""

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # DeepSpeed calls it

# DeepSpeed compiles a shared-memory operation when it finds a compiler; gloo does the same without.
deepspeed.ops.__dict__["__compatible_ops__"] = {}


@dataclass(frozen=True, slots=True)
class ZeroOptions:
    """How to shard, and what DeepSpeed must know of the step."""

    stage: int
    precision: Precision
    micro_batch: int
    """Sequences per rank and forward pass."""
    accumulation: int
    """Forward and backward passes per update."""
    grad_clip: float
    """Largest global gradient norm; 0 turns clipping off."""
    bucket_elements: int
    block_size: int = 1
    """Elements of a quantisation block; 1 when no state is quantised."""


class ZeroEngine(OneByOne):
    """A model and its optimizer, sharded over the default process group.

    All methods but ``slices`` and ``scalars`` are collective. The addresses of slices do not change. Give it the only
    reference to ``model``: ``close`` frees every tensor, and the process can build the next one.

    ``groups`` are parameter groups over ``model``'s parameters, ``make_optimizer`` turns groups into an optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParamGroups,
        make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
        states: OptimizerStates,
        options: ZeroOptions,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world == 1:  # nothing to partition; and stage 3 alone does not expect parameters that are filled up
            options = replace(options, stage=min(options.stage, 2))
        self._options, self._states = options, states
        _forget_engines()
        _name_ranks(self.rank, self.world)
        if options.stage in (1, 2):
            groups = pad_to_blocks(model, groups, options.block_size)
        names = {id(p): name for name, p in model.named_parameters()}
        self._optimizer = make_optimizer(groups)
        _cut_on_blocks(options.block_size, self.world)
        with _quiet(), _idle(self._optimizer):
            self._engine: Any = deepspeed.initialize(
                model=model,
                optimizer=self._optimizer,
                config=_config(options, sum(p.numel() for p in model.parameters())),
                dist_init_required=False,
            )[0]
        self._sharding = sharding_of(self._engine.optimizer, options.stage, names)
        if options.stage > 0:
            states.set_segments(self._optimizer, _parts(self._sharding.flats, names), len(names), _total)
        with self._seated():
            states.ensure_state(self._optimizer)
        self._slices = tuple(self._make_slices())

    # -- a step ---------------------------------------------------------------------------------------------------

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of one microbatch; collective in stage 3."""
        loss: Tensor = self._engine(tokens, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add this microbatch's share to the gradients; the last one of a step reduces them over the ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts

    def update(self, lr: float) -> float:
        """Clip, update, make the new weights known to every rank. Returns the global norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if not self._engine.is_gradient_accumulation_boundary():
            raise InvariantViolation(f"an update needs {self._options.accumulation} microbatches first")
        norm = self._sharding.clip(self._options.grad_clip)
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    @property
    def model(self) -> nn.Module:
        """What was given, with weights of the precision that trains; do not keep it."""
        model: nn.Module = self._engine.module
        return model

    # -- state ----------------------------------------------------------------------------------------------------

    def slices(self) -> Sequence[StateSlice]:
        """Master weights and optimizer state that this rank holds."""
        return self._slices

    def scalars(self) -> Mapping[str, object]:
        """What the optimizer keeps besides tensors, as JSON values, by parameter group; the same on every rank."""
        with self._seated() as flats:
            return {str(flat.group): dict(self._states.scalars(self._optimizer, flat.master)) for flat in flats}

    def load_scalars(self, scalars: Mapping[str, object]) -> None:
        """Put back what ``scalars`` returned, here or on any other rank, whatever its stage."""
        with self._seated() as flats:
            for flat in flats:
                values = cast(Mapping[str, object], scalars[str(flat.group)])
                self._states.load_scalars(self._optimizer, flat.master, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that train what the masters say, on every rank, after slices were written to."""
        self._sharding.refresh()

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Whole fp32 master weights by name, on the CPU of rank 0; empty elsewhere."""
        whole: dict[str, Tensor] = {}
        for flat in self._sharding.flats:
            for some in self._sharding.gather(flat):
                whole.update(some)
        return whole

    def close(self) -> None:
        """Free every tensor. Not collective: the peers may be gone."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with contextlib.suppress(RuntimeError), _quiet():
            engine.destroy()
        for parameter in engine.module.parameters():  # the traceback of a fault may still hold the model
            parameter.data, parameter.grad = torch.empty(0), None
        self._slices, self._optimizer, self._sharding = (), None, None  # type: ignore[assignment]  # closed for good
        del engine, parameter
        _end_interrupted_backward()
        _forget_engines()
        gc.collect()

    def _make_slices(self) -> Iterator[StateSlice]:
        with self._seated() as flats:
            for flat in flats:
                yield from state_slices(flat, self._states.describe_state(self._optimizer, flat.master))

    @contextlib.contextmanager
    def _seated(self) -> Iterator[Sequence[Flat]]:
        """Show the optimizer its flat parameters: stage 3 takes them away between steps."""
        groups, flats = self._optimizer.param_groups, self._sharding.flats
        before = [group["params"] for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [flat.master for flat in flats if flat.group == number]
        try:
            yield flats
        finally:
            for group, params in zip(groups, before, strict=True):
                group["params"] = params


def _parts(flats: Sequence[Flat], names: Names) -> dict[Tensor, list[tuple[int, int, int]]]:
    """Where each flat tensor holds which parameter, numbered as the model has them."""
    numbers = {name: number for number, name in enumerate(names.values())}
    return {flat.master: [(p.at, p.at + p.stop - p.start, numbers[p.name]) for p in flat.pieces] for flat in flats}


def _total(vector: Tensor) -> Tensor:
    """Collective. The sum over ranks."""
    dist.all_reduce(vector)
    return vector


# -- what DeepSpeed has no option for ----------------------------------------------------------------------------------


def _cut_on_blocks(block_size: int, world: int) -> None:
    """From now on DeepSpeed fills flat groups (stages 1, 2) and parameters (stage 3) up to whole blocks per rank.

    Its own rule, a multiple of two elements per rank, would let two ranks share a block. There is no option for it.
    """
    multiple = block_size * world

    def flatten(self: Any, tensors: Any, alignment: int, **options: Any) -> Tensor:
        if "param_padding" in options:  # weights; gradients of a share come as they are
            alignment = math.lcm(alignment, multiple)
        flat: Tensor = _flatten(self, tensors, alignment, **options)
        return flat

    def padding(_: Any, param: Any) -> int:
        return int(-param.ds_numel % multiple)

    def whole_blocks(share: float) -> int:
        return math.ceil(share / block_size) * block_size

    def reduce_scatter(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
        filled = [F.pad(t.reshape(-1), (0, -t.numel() % multiple)) for t in tensors]
        scattered: list[Tensor] = _reduce_scatter(filled, group)
        return scattered

    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = flatten
    ds_partition.Init._padding_size = padding
    ds_partition.math = SimpleNamespace(ceil=whole_blocks)  # rounds a parameter's share up, when gathering it alone
    ds_stage3.reduce_scatter_coalesced = reduce_scatter


_flatten = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
_reduce_scatter = ds_stage3.reduce_scatter_coalesced


# -- DeepSpeed's settings, noise and memory ---------------------------------------------------------------------------


def _config(options: ZeroOptions, elements: int) -> dict[str, Any]:
    is_bf16 = options.precision is Precision.BF16
    # DeepSpeed allocates whole buckets, of an even size, however small the model is.
    bucket = min(options.bucket_elements, elements) // 2 * 2 + 2
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        # In stage 0 with fp32 DeepSpeed clips without telling the norm.
        "gradient_clipping": options.grad_clip if options.stage or is_bf16 else 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": {
            "stage": options.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_param_persistence_threshold": _PERSISTENT_ELEMENTS,
        },
        "steps_per_print": 10**9,
    }
    if is_bf16 and options.stage in (2, 3):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _name_ranks(rank: int, world: int) -> None:
    """What a launcher would have put into the environment. Without the last one, stage 3 on a CPU asks ``numactl`` for
    it in every backward pass."""
    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else 0
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank), LOCAL_SIZE="1")
    # A second group would have connections of its own, which nobody could wake a blocked rank from.
    ds_groups._WORLD_GROUP = dist.group.WORLD


def _forget_engines() -> None:
    """Undo what DeepSpeed keeps per process, so that engines can be freed, and survivors start like newcomers."""
    ds_comm.cdb = None
    ds_groups._release_process_group_references()
    ds_partition.Init.param_id = 0
    ds_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    ds_offload.FWD_MODULE_STACK.clear()  # its first entry is the model
    for cache in _CACHES:
        cache.cache_clear()
    F.linear = _LINEAR


def _end_interrupted_backward() -> None:
    """torch keeps the rest of a backward pass that failed, activations included, until this thread starts another."""
    torch.autograd.backward(torch.zeros((), requires_grad=True))


def _method_caches(cls: type) -> Iterator[Any]:
    """Caches that live as long as the class, and with them every object and every module they were asked for."""
    for method in vars(cls).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                yield cell.cell_contents


_CACHES = tuple(_method_caches(PartitionedParameterCoordinator))
_LINEAR = F.linear  # stage 3 puts another in its place


@contextlib.contextmanager
def _idle(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, steps do nothing: DeepSpeed makes one to allocate state, and even gradients of 0 move weights that decay,
    and moments that decay is a part of."""
    vars(optimizer)["step"] = lambda closure=None: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed warns of its own habits on every construction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
