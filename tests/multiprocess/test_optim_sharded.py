"""Optimizers of parameters that are sharded over real ranks: the bits of one rank, whatever the number and the cut."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import holdfast.optim
from holdfast.errors import ConfigurationError
from holdfast.optim import BlockwiseOptimizer
from tests.support.local_cluster import LocalCluster, Member

_CLUSTER = LocalCluster(deadline_s=60.0)
_TIMEOUT_S = 25.0
"""Of collectives."""
_SHARED = {"block_size": 64, "min_8bit_size": 300}
_SHAPES = {
    "aligned": (12, 128),
    "cut": (37, 130),
    "cut_evenly": (6, 96),
    "fewer_rows_than_ranks": (2, 700),
    "fewer_rows_than_ranks_aligned": (1, 512),
    "ragged_vector": (1311,),
    "even_vector": (1536,),
    "convolution": (7, 4, 4, 4),
    "experts": (3, 5, 64),
    "kept_in_32_bits": (7, 11),
}
_CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"percentile_clipping": 20, "maximize": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("Lion", {}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("LAMB", {}),
    ("LARS", {"weight_decay": 0.1}),
    ("AdEMAMix", {"t_alpha": 5, "t_beta3": 5}),
]
_Placing: TypeAlias = "Sequence[Any]"
"""Placements, of torch, which the driver need not import."""


# -- what ranks do ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _group(member: Member, name: str = "epoch") -> Iterator[Any]:
    """A gloo group and a mesh over it."""
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")  # torch's own, of which DTensor and checkpoints have many
    torch.set_num_threads(1)
    where, timeout = f"file://{member.rendezvous(name)}", timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=where, rank=member.rank, world_size=member.world, timeout=timeout)
    try:
        yield init_device_mesh("cpu", (member.world,))
    finally:
        dist.destroy_process_group()


class _Bag(nn.Module):
    """Parameters of all shapes, the same on every rank."""

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = _SHAPES) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw).to(dtype)))


def _make(name: str, params: Any, **options: Any) -> BlockwiseOptimizer:
    optimizer: BlockwiseOptimizer = getattr(holdfast.optim, name)(params, **{**_SHARED, **options})
    return optimizer


def _gradients(model: nn.Module, step: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The same whole gradients on every rank, with elements and a whole block that cannot be used."""
    draw = torch.Generator().manual_seed(1000 + step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=draw) * (30.0 if step == 2 else 1.0)
        flat = grad.view(-1)
        flat[step::101] = torch.nan
        flat[64:128] = torch.inf
        yield param, grad.to(param.dtype)


def _train(model: nn.Module, optimizer: BlockwiseOptimizer, steps: range) -> None:
    for step in steps:
        for param, grad in _gradients(model, step):
            param.grad = _sharded(grad, param)
        optimizer.step()


def _sharded(whole: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements)


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _place(model: nn.Module, mesh: Any, placements: _Placing) -> nn.Module:
    from torch.distributed.tensor import distribute_tensor

    for name, param in list(model.named_parameters()):
        sharded = distribute_tensor(param.detach(), mesh, list(placements))
        model.register_parameter(name, nn.Parameter(sharded))
    return model


def _fully_sharded(mesh: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = _Bag(dtype)
    fully_shard(model, mesh=mesh)
    return model


def _differences(
    model: nn.Module, optimizer: BlockwiseOptimizer, one: nn.Module, alone: BlockwiseOptimizer
) -> list[str]:
    """Collective. Where whole parameters and state differ in a bit from those of one rank."""
    found = []
    for (name, param), expected in zip(model.named_parameters(), one.parameters(), strict=True):
        state, want = optimizer.state[param], alone.state[expected]
        pairs = {"weights": (param, expected), **{key: (state[key], want[key]) for key in want}}
        for key, (have, wanted) in pairs.items():
            have = _whole(have)
            is_same = torch.equal(have, wanted) if isinstance(have, Tensor) else have == wanted
            found += [] if is_same else [f"{key} of {name}"]
        found += [] if list(state) == list(want) else [f"keys of {name}"]
    return found


# -- the bits of one rank ---------------------------------------------------------------------------------------------


def _every_rule(member: Member, bits: int) -> dict[str, list[str]]:
    found = {}
    with _group(member) as mesh:
        for name, options in _CASES:
            one, model = _Bag(), _fully_sharded(mesh)
            alone, optimizer = (_make(name, m.parameters(), bits=bits, **options) for m in (one, model))
            _train(one, alone, range(4))
            _train(model, optimizer, range(4))
            found[f"{name} {options}"] = _differences(model, optimizer, one, alone)
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 32])
def test_every_rule_has_the_bits_of_one_rank(bits: int, world: int) -> None:
    for found in _CLUSTER.run(_every_rule, world, bits):
        assert found == {case: [] for case in found} and len(found) == len(_CASES)


def _rounded_at_random(member: Member) -> list[str]:
    from torch.distributed.tensor import Shard

    options = {"stochastic_rounding": True, "seed": 5, "lr": 1e-2}
    matrices = {"even": (12, 128 * 3), "ragged": (9, 130)}
    found = []
    with _group(member) as mesh:
        one, model = _Bag(torch.bfloat16), _fully_sharded(mesh, torch.bfloat16)
        alone, optimizer = (_make("AdamW8bit", m.parameters(), **options) for m in (one, model))
        _train(one, alone, range(3))
        _train(model, optimizer, range(3))
        found += _differences(model, optimizer, one, alone)
        one, model = _Bag(torch.bfloat16, matrices), _place(_Bag(torch.bfloat16, matrices), mesh, [Shard(1)])
        alone, optimizer = (_make("AdamW8bit", m.parameters(), **options) for m in (one, model))
        _train(one, alone, range(3))
        _train(model, optimizer, range(3))
        return found + _differences(model, optimizer, one, alone)


@pytest.mark.parametrize("world", [2, 3])
def test_stochastic_rounding_draws_what_one_rank_draws(world: int) -> None:
    assert _CLUSTER.run(_rounded_at_random, world) == [[]] * world


def _other_placements(member: Member) -> dict[str, list[str]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    shapes = {"columns": (6, 512), "ragged_columns": (9, 130), "experts": (3, 10, 64), "odd": (5, 7, 30)}
    found = {}
    with _group(member) as line:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner")) if member.world == 4 else None
        cases = {"replicated": (line, [Replicate()]), "columns": (line, [Shard(1)])}
        if square is not None:
            cases |= {
                "hybrid": (square, [Replicate(), Shard(0)]),
                "both dims": (square, [Shard(0), Shard(1)]),
                "twice": (square, [Shard(0), Shard(0)]),
            }
        for case, (mesh, placements) in cases.items():
            for name in ("AdamW8bit", "LAMB8bit"):
                one, model = _Bag(shapes=shapes), _place(_Bag(shapes=shapes), mesh, placements)
                alone, optimizer = (_make(name, m.parameters()) for m in (one, model))
                _train(one, alone, range(3))
                _train(model, optimizer, range(3))
                found[f"{case} {name}"] = _differences(model, optimizer, one, alone)
    return found


@pytest.mark.parametrize("world", [3, 4])
def test_other_placements_and_meshes_have_the_bits_of_one_rank(world: int) -> None:
    for found in _CLUSTER.run(_other_placements, world):
        assert found == {case: [] for case in found} and len(found) == (4 if world == 3 else 10)


def _tensor_parallel(member: Member) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    def made() -> nn.Module:
        return _Bag(shapes={"by_rows": (8, 256), "cut": (12, 33), "by_columns": (10, 256)})

    with _group(member):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        one, model = made(), made()
        for name, param in list(model.named_parameters()):
            placement = Shard(1 if name == "by_columns" else 0)
            sharded = distribute_tensor(param.detach(), mesh["tensor"], [placement])
            model.register_parameter(name, nn.Parameter(sharded))
        fully_shard(model, mesh=mesh["data"])
        alone, optimizer = (_make("LAMB8bit", m.parameters()) for m in (one, model))
        _train(one, alone, range(3))
        for step in range(3):
            for param, grad in _gradients(model, step):
                param.grad = torch.zeros_like(param)
                _fill(param.grad, grad)
            optimizer.step()
        return _differences(model, optimizer, one, alone)


def _fill(sharded: Any, whole: Tensor) -> None:
    """By where FSDP on top of tensor parallelism puts things, which ``distribute_tensor`` does not do."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, start = compute_local_shape_and_global_offset(whole.shape, sharded.device_mesh, sharded.placements)
    for dim, (first, length) in enumerate(zip(start, size, strict=True)):
        whole = whole.narrow(dim, first, length)
    sharded.to_local().copy_(whole)


def test_fully_sharded_on_top_of_tensor_parallel_has_the_bits_of_one_rank() -> None:
    assert _CLUSTER.run(_tensor_parallel, 4) == [[]] * 4


# -- gradients --------------------------------------------------------------------------------------------------------


def _gradients_placed_otherwise(member: Member) -> list[str]:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    with _group(member) as mesh:
        one, model = _Bag(), _fully_sharded(mesh)
        alone, optimizer = (_make("AdamW8bit", m.parameters()) for m in (one, model))
        for step in range(4):
            for (param, grad), expected in zip(_gradients(model, step), one.parameters(), strict=True):
                expected.grad = grad
                part = grad if member.rank == 0 else torch.zeros_like(grad)
                if step % 2:
                    param.grad = DTensor.from_local(grad, mesh, [Replicate()])
                else:
                    param.grad = DTensor.from_local(part, mesh, [Partial()])
            alone.step()
            optimizer.step()
        return _differences(model, optimizer, one, alone)


def test_gradients_of_another_placement_are_moved_to_that_of_the_parameter() -> None:
    assert _CLUSTER.run(_gradients_placed_otherwise, 2) == [[]] * 2


def _unlike_gradients(member: Member) -> list[str]:
    with _group(member) as mesh:
        plain, sharded = _Bag(), _fully_sharded(mesh)
        said = []
        for model, other in ((plain, sharded), (sharded, plain)):
            optimizer = _make("AdamW8bit", model.parameters())
            _train(model, optimizer, range(1))
            before = [_whole(value).clone() for value in model.parameters()]
            param, unlike = model.experts, other.experts.detach()
            try:
                param.grad = unlike
                optimizer.step()
            except ConfigurationError as error:
                said.append(str(error))
            assert all(torch.equal(_whole(a), b) for a, b in zip(model.parameters(), before, strict=True))
        return said


def test_a_gradient_that_is_not_sharded_as_its_parameter_is_refused_before_anything_changes() -> None:
    for first, second in _CLUSTER.run(_unlike_gradients, 2):
        assert "parameter 8 of group 0 is a plain tensor and its gradient a DTensor" in first
        assert "parameter 8 of group 0 is a DTensor and its gradient a plain tensor" in second


# -- training and checkpoints -----------------------------------------------------------------------------------------


def _compiled(member: Member, compiled: bool) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    with _group(member) as mesh:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 9), nn.GELU(), nn.Linear(9, 3))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = _make("AdamW8bit", model.parameters(), lr=1e-2)
        call = torch.compile(model, backend="eager") if compiled else model
        x, y = torch.randn(16, 33), torch.randn(16, 3)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(call(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_fully_sharded_model_trains(compiled: bool) -> None:
    first, second = _CLUSTER.run(_compiled, 2, compiled)
    assert first == second and first[-1] < 0.5 * first[0]


_STATE_CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW8bit", {"percentile_clipping": 30}),
    ("AdEMAMix8bit", {}),
    ("LAMB", {}),
]


def _carried_in_memory(member: Member, reading: dict[str, bool], writing: dict[str, bool]) -> dict[str, list[str]]:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )  # fmt: skip

    found = {}
    with _group(member) as mesh:
        for name, options in _STATE_CASES:
            one, model = _Bag(), _fully_sharded(mesh)
            alone, optimizer = (_make(name, m.parameters(), **options) for m in (one, model))
            _train(one, alone, range(5))
            _train(model, optimizer, range(3))
            taken = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**reading))
            heir = _make(name, model.parameters(), **options)
            heir.zero_grad()  # else torch would not make the state it loads into
            set_optimizer_state_dict(model, heir, taken, options=StateDictOptions(**writing))
            _train(model, heir, range(3, 5))
            found[name] = _differences(model, heir, one, alone)
    return found


_FULL, _FLAT, _ON_CPU = {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}, {"cpu_offload": True}


@pytest.mark.parametrize(
    ("reading", "writing"),
    [
        ({}, {}),
        (_ON_CPU, _ON_CPU),
        (_FULL, _FULL),
        (_FULL | _ON_CPU, _FULL | {"broadcast_from_rank0": True}),
        (_FLAT, _FLAT),
        (_FLAT | _FULL, _FLAT),  # torch fails to write flat and full ones, with its own optimizers too
    ],
    ids=["sharded", "on the CPU", "full", "full on one rank", "flat", "flat and full"],
)
def test_state_dicts_of_torch_carry_every_bit(reading: dict[str, bool], writing: dict[str, bool]) -> None:
    for found in _CLUSTER.run(_carried_in_memory, 2, reading, writing):
        assert found == {name: [] for name, _ in _STATE_CASES}


def _own_state_dict(member: Member) -> list[str]:
    """A whole state dict of one rank, loaded into shards and back into one rank."""
    with _group(member) as mesh:
        one, model, again = _Bag(), _fully_sharded(mesh), _Bag()
        alone, optimizer, other = (_make("AdamW8bit", m.parameters()) for m in (one, model, again))
        _train(one, alone, range(2))
        for source, target in zip(one.parameters(), model.parameters(), strict=True):
            target.data.copy_(_sharded(source.detach(), target))
        optimizer.load_state_dict(alone.state_dict())
        _train(one, alone, range(2, 4))
        _train(model, optimizer, range(2, 4))
        other.load_state_dict(optimizer.state_dict())
        for source, copy in zip(model.parameters(), again.parameters(), strict=True):
            copy.data.copy_(_whole(source.detach()))
        return _differences(model, optimizer, one, alone) + _differences(again, other, one, alone)


def test_a_state_dict_of_one_rank_loads_into_shards_and_back() -> None:
    assert _CLUSTER.run(_own_state_dict, 3) == [[]] * 3


def _save(member: Member, name: str, where: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    with _group(member) as mesh:
        model = _fully_sharded(mesh)
        optimizer = _make(name, model.parameters())
        _train(model, optimizer, range(3))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=where)


def _resume(member: Member, name: str, where: str, sharded: bool) -> list[str]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with _group(member) as mesh:
        one, model = _Bag(), _fully_sharded(mesh) if sharded else _Bag()
        alone, optimizer = (_make(name, m.parameters()) for m in (one, model))
        _train(one, alone, range(5))
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=where)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        _train(model, optimizer, range(3, 5))
        return _differences(model, optimizer, one, alone)


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit"])
def test_a_checkpoint_of_two_ranks_goes_on_with_every_bit_on_one_and_on_three(name: str, tmp_path: Path) -> None:
    where = str(tmp_path / "checkpoint")
    _CLUSTER.run(_save, 2, name, where)
    for world, sharded in ((1, False), (1, True), (3, True)):
        assert _CLUSTER.run(_resume, world, name, where, sharded) == [[]] * world
