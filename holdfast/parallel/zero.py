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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import InvariantViolation
from holdfast.parallel.slices import Flat, Piece, StateTensor, cut, pieces_of_partition, state_slices
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
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups as ds_groups

__all__ = ["OptimizerStates", "ZeroEngine", "ZeroOptions", "warm_up"]

_PERSISTENT_ELEMENTS = 10_000
"""Stage 3 keeps smaller parameters gathered: norms of any model, no matrix of a real one."""

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # DeepSpeed calls it

# DeepSpeed compiles a shared-memory operation when it finds a compiler; gloo does the same without.
deepspeed.ops.__dict__["__compatible_ops__"] = {}

ParamGroups = list[dict[str, Any]]
"""``torch.optim`` parameter groups: ``params`` and options, which are the optimizer's own."""


def warm_up() -> None:
    """Importing this module is what takes long; a spare does it before it is needed."""


class OptimizerStates(Protocol):
    """Knows what an optimizer keeps per parameter. ``holdfast.optim`` is one."""

    def ensure_state(self, optimizer: torch.optim.Optimizer, /) -> None: ...

    def describe_state(self, optimizer: torch.optim.Optimizer, param: Tensor, /) -> Sequence[StateTensor]: ...

    def scalars(self, optimizer: torch.optim.Optimizer, param: Tensor, /) -> Mapping[str, object]: ...

    def load_scalars(
        self, optimizer: torch.optim.Optimizer, param: Tensor, values: Mapping[str, object], /
    ) -> None: ...


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


class ZeroEngine:
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
        self._options, self._states = options, states
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        _forget_earlier_engines(self.rank, self.world)
        if options.stage in (1, 2):
            groups = _pad_parameters(model, groups, options.block_size)
        names = {id(p): name for name, p in model.named_parameters()}
        self._optimizer = make_optimizer(groups)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # DeepSpeed may make a step of its own to allocate state; it must not move anything
        _cut_on_blocks(options.block_size, self.world)
        with _quiet():
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=_config(options), dist_init_required=False
            )[0]
        self._sharding = _sharding(self._engine.optimizer, options, names, self.rank, self.world)
        with self._seated():
            states.ensure_state(self._optimizer)
        self._reset_scalars()
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
        norm = self._sharding.clip()
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

    # -- state ----------------------------------------------------------------------------------------------------

    def slices(self) -> Sequence[StateSlice]:
        """Master weights and optimizer state that this rank holds."""
        return self._slices

    def scalars(self) -> Mapping[str, object]:
        """What the optimizer keeps besides tensors, as JSON values, by flat tensor."""
        with self._seated():
            return {f"{i}": dict(self._states.scalars(self._optimizer, f.master)) for i, f in self._flats()}

    def load_scalars(self, scalars: Mapping[str, object]) -> None:
        """Put back what ``scalars`` returned."""
        with self._seated():
            for i, flat in self._flats():
                values = cast(Mapping[str, object], scalars[str(i)])
                self._states.load_scalars(self._optimizer, flat.master, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that train what the masters say, on every rank, after slices were written to."""
        self._sharding.refresh()

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Whole fp32 master weights by name, on the CPU of rank 0; empty elsewhere."""
        found: dict[str, Tensor] = {}
        for _, flat in self._flats():
            for whole in self._sharding.gather(flat):
                if self.rank == 0:
                    found.update(whole)
        return found

    def close(self) -> None:
        """Free every tensor. Not collective: the peers may be gone."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with contextlib.suppress(RuntimeError), _quiet():  # its clean-up may want collectives that cannot work now
            engine.destroy()
        self._slices, self._optimizer, self._sharding = (), None, None  # type: ignore[assignment]  # closed for good
        _release(engine)
        del engine
        gc.collect()

    def _flats(self) -> Iterable[tuple[int, Flat]]:
        return enumerate(self._sharding.flats)

    def _make_slices(self) -> Iterator[StateSlice]:
        with self._seated():
            for _, flat in self._flats():
                yield from state_slices(flat, self._states.describe_state(self._optimizer, flat.master))

    def _reset_scalars(self) -> None:
        with self._seated():
            for _, flat in self._flats():
                fresh = dict.fromkeys(self._states.scalars(self._optimizer, flat.master), 0)
                self._states.load_scalars(self._optimizer, flat.master, fresh)

    @contextlib.contextmanager
    def _seated(self) -> Iterator[None]:
        """Show the optimizer its flat parameters: stage 3 takes them away between steps."""
        groups = self._optimizer.param_groups
        before = [group["params"] for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [flat.master for _, flat in self._flats() if flat.group == number]
        try:
            yield
        finally:
            for group, params in zip(groups, before, strict=True):
                group["params"] = params


# -- where each stage keeps its state ---------------------------------------------------------------------------------


class _Sharding(Protocol):
    """One stage's memory: this rank's flat masters, and how they become the weights that train."""

    @property
    def flats(self) -> Sequence[Flat]: ...

    def refresh(self) -> None: ...

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        """Collective. Whole parameters, a few at a time; only rank 0 needs them."""
        ...

    def clip(self) -> Tensor | None:
        """Clip where DeepSpeed does not; the norm, or None where it does."""
        ...


class _Replicated:
    """Stage 0: every rank holds everything. In fp32 the weights are their own masters."""

    def __init__(self, optimizer: Any, options: ZeroOptions, names: Mapping[int, str]) -> None:
        self._clip_at = options.grad_clip
        self._has_masters = options.precision is Precision.BF16
        self._weights = optimizer.fp16_groups if self._has_masters else [g["params"] for g in optimizer.param_groups]
        masters = optimizer.fp32_groups if self._has_masters else self._weights
        self.flats = [
            Flat(number, master, (Piece(names[id(weight)], tuple(weight.shape), 0, weight.numel(), 0),))
            for number, (group, group_masters) in enumerate(zip(self._weights, masters, strict=True))
            for weight, master in zip(group, group_masters, strict=True)
        ]

    def refresh(self) -> None:
        if self._has_masters:
            weights = [weight for group in self._weights for weight in group]
            for weight, flat in zip(weights, self.flats, strict=True):
                weight.copy_(flat.master)

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        yield {flat.pieces[0].name: flat.master.detach().float().cpu().clone()}

    def clip(self) -> Tensor | None:
        if self._has_masters:
            return None
        weights = [weight for group in self._weights for weight in group]
        return torch.nn.utils.clip_grad_norm_(weights, self._clip_at or math.inf)


class _FlatGroups:
    """Stages 1 and 2: each parameter group is one flat tensor, cut into equal shares."""

    def __init__(self, optimizer: Any, names: Mapping[int, str], rank: int, world: int) -> None:
        self._optimizer, self._world = optimizer, world
        is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        groups = optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups
        masters = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
        self._sizes = [[(names[id(p)], tuple(p.shape)) for p in group] for group in groups]
        self.flats = []
        for number, master in enumerate(masters):
            low = rank * master.numel()
            pieces = pieces_of_partition(self._sizes[number], low, low + master.numel())
            kept = tuple(piece for piece in pieces if not piece.name.startswith(_PADDING))
            self.flats.append(Flat(number, master, kept))

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        whole = _all_gather(flat.master, self._world)
        for piece in pieces_of_partition(self._sizes[flat.group], 0, whole.numel()):
            if not piece.name.startswith(_PADDING):
                yield {piece.name: whole[piece.at : piece.at + piece.stop].view(piece.shape).clone()}

    def clip(self) -> Tensor | None:
        return None


class _Partitioned:
    """Stage 3: each parameter is cut into equal shares, and a rank's shares lie one behind the other."""

    def __init__(self, optimizer: Any, names: Mapping[int, str], rank: int, world: int) -> None:
        self._optimizer, self._world = optimizer, world
        self._weights = optimizer.fp16_groups
        self._names = names
        self.flats = []
        for number, (group, master) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            cuts = [
                cut(names[id(p)], tuple(p.ds_shape), p.partition_numel(), rank, at)
                for p, at in zip(group, _offsets([p.partition_numel() for p in group]), strict=True)
            ]
            pieces = tuple(piece for piece in cuts if piece is not None)
            self.flats.append(Flat(optimizer.sub_group_to_group_id[number], master, pieces))

    def refresh(self) -> None:
        optimizer = self._optimizer
        for number, flat in enumerate(self.flats):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.master.data)
            optimizer._unflatten_partitioned_parameters(number)
        kept = optimizer.persistent_parameters
        if kept:  # gathered already: cut them again, or they would keep their old values
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        number = next(n for n, other in enumerate(self.flats) if other is flat)
        group = self._weights[number]
        for weight, at in zip(group, _offsets([p.partition_numel() for p in group]), strict=True):
            whole = _all_gather(flat.master[at : at + weight.partition_numel()], self._world)
            yield {self._names[id(weight)]: whole[: weight.ds_numel].view(tuple(weight.ds_shape)).clone()}

    def clip(self) -> Tensor | None:
        return None


def _sharding(optimizer: Any, options: ZeroOptions, names: Mapping[int, str], rank: int, world: int) -> _Sharding:
    if options.stage == 0:
        return _Replicated(optimizer, options, names)
    if options.stage == 3:
        return _Partitioned(optimizer, names, rank, world)
    return _FlatGroups(optimizer, names, rank, world)


def _offsets(sizes: Sequence[int]) -> list[int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += size
    return offsets


def _all_gather(part: Tensor, world: int) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.cat(parts).float().cpu()


# -- the grid of quantisation blocks ----------------------------------------------------------------------------------

_PADDING = "holdfast_padding_"


def _pad_parameters(model: nn.Module, groups: ParamGroups, block_size: int) -> ParamGroups:
    """Behind every parameter that ends inside a block, a parameter that fills it up, never used and always zero."""
    padded, count = [], 0
    for group in groups:
        params: list[Tensor] = []
        for param in group["params"]:
            params.append(param)
            missing = -param.numel() % block_size
            if missing:
                filler = nn.Parameter(torch.zeros(missing, dtype=param.dtype, device=param.device))
                model.register_parameter(f"{_PADDING}{count}", filler)
                params.append(filler)
                count += 1
        padded.append({**group, "params": params})
    return padded


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


def _config(options: ZeroOptions) -> dict[str, Any]:
    is_bf16 = options.precision is Precision.BF16
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        # In stage 0 with fp32 DeepSpeed clips without telling the norm.
        "gradient_clipping": options.grad_clip if options.stage or is_bf16 else 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": {
            "stage": options.stage,
            "reduce_bucket_size": options.bucket_elements,
            "allgather_bucket_size": options.bucket_elements,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_param_persistence_threshold": _PERSISTENT_ELEMENTS,
        },
        "steps_per_print": 10**9,
    }
    if is_bf16 and options.stage in (2, 3):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _forget_earlier_engines(rank: int, world: int) -> None:
    """Counters and caches that DeepSpeed keeps per process: survivors and replacements must start from the same."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(_local_rank()))
    ds_comm.cdb = None
    ds_groups._release_process_group_references()
    # A second group would have connections of its own, which nobody could wake a blocked rank from.
    ds_groups._WORLD_GROUP = dist.group.WORLD
    ds_partition.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _local_rank() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _release(engine: Any) -> None:
    """Break what would keep the weights alive after ``destroy``."""
    for module in engine.module.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
        module._backward_pre_hooks.clear()
    for parameter in engine.module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        parameter.grad = None
    ds_offload.FWD_MODULE_STACK.clear()
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as C

    for method in vars(C).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
    ds_groups._release_process_group_references()
    ds_comm.cdb = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed warns of its own habits on every construction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
