"""State dicts of ``torch.optim``, bitsandbytes and torchao made ours, and ours made theirs.

A state dict is translated only where nothing is lost: moments decode to the same fp32 values on both sides, so a run
goes on with exactly the moments it had. Where that cannot be, the functions refuse and say what to do; ``lossy=True``
quantises anew, rounds, or drops instead. Options travel along (learning rate, betas, ...); those that the other side
has no word for keep the optimizer's values. None of the three packages is needed to read its state.

What ``to_*`` returns shares no memory with the optimizer. What ``from_*`` returns may share it with the state dict it
was made of; ``load_state_dict`` copies.

A state dict does not say which class wrote it: the optimizer has to be built as its counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from holdfast.errors import ConfigurationError
from holdfast.optim.optimizer import BlockwiseOptimizer
from holdfast.optim.peers import BitsandbytesFormat, Moment, Peer, Place, TorchAOFormat, TorchFormat, recoded
from holdfast.optim.state8bit import CODES, HISTORY, is_8bit

__all__ = ["from_bitsandbytes", "from_torch", "from_torchao", "to_bitsandbytes", "to_torch", "to_torchao"]

StateDict = dict[str, Any]
"""Any, as in torch: values are tensors, numbers and, in torchao's, tensor subclasses."""


def from_torch(state_dict: Mapping[str, Any], optimizer: BlockwiseOptimizer, *, lossy: bool = False) -> StateDict:
    """What ``optimizer.load_state_dict`` takes, of a state dict of the class of the same name in ``torch.optim``.

    Moments in 32 bits keep every bit; for parameters that ``optimizer`` would keep in 8 bits, ``lossy`` quantises them.
    ``torch.optim.SGD`` counts no steps, so the count begins at 1.

    Raises: ConfigurationError with all that does not fit or would be lost.
    """
    return _imported(TorchFormat(), state_dict, optimizer, lossy)


def to_torch(optimizer: BlockwiseOptimizer, *, lossy: bool = False) -> StateDict:
    """What the class of the same name in ``torch.optim`` loads. Moments in 8 bits are decoded, which loses nothing.

    torch keeps moments in the parameter's dtype; where that rounds them, only ``lossy`` goes on.

    Raises: ConfigurationError with all that torch has no place for.
    """
    return _exported(TorchFormat(), optimizer, lossy)


def from_torchao(state_dict: Mapping[str, Any], optimizer: BlockwiseOptimizer, *, lossy: bool = False) -> StateDict:
    """What ``optimizer.load_state_dict`` takes, of a state dict of torchao's ``AdamW8bit`` or ``Adam8bit``.

    Tensors that torchao keeps unquantised stay so, unless ``lossy`` and ``optimizer`` would keep them in 8 bits.

    Raises: ConfigurationError with all that does not fit or would be lost.
    """
    return _imported(TorchAOFormat(), state_dict, optimizer, lossy)


def to_torchao(optimizer: BlockwiseOptimizer, *, lossy: bool = False) -> StateDict:
    """What torchao's ``AdamW8bit`` or ``Adam8bit`` loads. A tensor that is no multiple of the block size goes over
    decoded, as torchao itself keeps such ones. Needs torchao, for its tensor class.

    Raises: ConfigurationError with all that torchao has no place for.
    """
    return _exported(TorchAOFormat(), optimizer, lossy)


def from_bitsandbytes(
    state_dict: Mapping[str, Any], optimizer: BlockwiseOptimizer, *, lossy: bool = False
) -> StateDict:
    """What ``optimizer.load_state_dict`` takes, of a state dict of bitsandbytes' class of the same name.

    Tensors that were kept in 32 bits stay so, unless ``lossy`` and ``optimizer`` would keep them in 8 bits. RMSprop and
    Adagrad keep squares with the signed codebook there and the unsigned one here: in 8 bits they need ``lossy``.

    Raises: ConfigurationError with all that does not fit or would be lost.
    """
    return _imported(BitsandbytesFormat(), state_dict, optimizer, lossy)


def to_bitsandbytes(optimizer: BlockwiseOptimizer, *, lossy: bool = False) -> StateDict:
    """What the class of the same name in ``bitsandbytes.optim`` loads: blocks of 256 and its own two codebooks.

    Raises: ConfigurationError with all that bitsandbytes has no place for.
    """
    return _exported(BitsandbytesFormat(), optimizer, lossy)


def _imported(peer: Peer, state_dict: Mapping[str, Any], optimizer: BlockwiseOptimizer, lossy: bool) -> StateDict:
    kind = _kind_of(optimizer, peer)
    groups, theirs = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    sizes, their_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in theirs]
    if sizes != their_sizes:
        raise ConfigurationError(
            f"the state dict has groups of {their_sizes} parameters, this optimizer has groups of {sizes}"
        )
    problems: list[str] = []
    for number, (group, saved) in enumerate(zip(groups, theirs, strict=True)):
        with _collected(problems):
            taken = peer.options(kind, saved) | {key: saved[key] for key in ("initial_lr",) if key in saved}
            _check_structure(optimizer, group, taken, number)
            group.update(taken)
    order = [index for group in theirs for index in group["params"]]
    places = dict(zip(order, _places(optimizer, kind, lossy), strict=True))
    ours = dict(zip(order, (index for group in groups for index in group["params"]), strict=True))
    state: dict[int, dict[str, Any]] = {}
    for index, entry in state_dict["state"].items() if not problems else ():
        with _collected(problems):
            if index not in places:
                raise ConfigurationError(f"the state dict holds state for parameter {index!r}, which no group has")
            read = peer.read(entry, places[index]) if entry else None
            if read is not None:
                state[ours[index]] = {"step": read[0], **_kept(read[1], places[index], peer)}
    if problems:
        raise ConfigurationError(problems)
    return {"state": state, "param_groups": groups}


def _exported(peer: Peer, optimizer: BlockwiseOptimizer, lossy: bool) -> StateDict:
    kind = _kind_of(optimizer, peer)
    problems: list[str] = []
    groups, state = [], {}
    for group in optimizer.state_dict()["param_groups"]:
        with _collected(problems):
            kept = {key: group[key] for key in ("initial_lr", "params") if key in group}
            groups.append(peer.group(kind, group) | kept)
    for index, place in enumerate(_places(optimizer, kind, lossy)) if not problems else ():
        held = optimizer.state.get(place.param)
        if held:
            with _collected(problems):
                entry = peer.write(held["step"], _held(held, place), place)
                if entry is not None:
                    state[index] = entry
    if problems:
        raise ConfigurationError(problems)
    return {"state": state, "param_groups": groups}


def _kind_of(optimizer: BlockwiseOptimizer, peer: Peer) -> str:
    """The optimizer's name without ``8bit``, which the peer must have too."""
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise ConfigurationError(f"{type(optimizer).__name__} is no optimizer of holdfast.optim; build one, then load")
    names = [base.__name__.removesuffix("8bit") for base in type(optimizer).__mro__]
    if "LARS" in names and peer.name == "bitsandbytes":
        raise ConfigurationError(
            "bitsandbytes' LARS sums gradients up, LARS here gradients times trust ratios: no factor turns one into "
            "the other. Its 8-bit form has no trust ratio at all and is SGD8bit: build that"
        )
    known = next((name for name in names if name in (*peer.kinds, "LARS")), None)
    if known not in peer.kinds:
        raise ConfigurationError(f"{peer.name} has no {names[0]}; it shares {', '.join(peer.kinds)}")
    return known


def _places(optimizer: BlockwiseOptimizer, kind: str, lossy: bool) -> Iterator[Place]:
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            name = f"parameter {position} of group {number}"
            if "param_names" in group:
                name = f"parameter {group['param_names'][position]!r}"
            yield Place(name, param, group, optimizer.rule(group).moments, kind, lossy)


def _check_structure(
    optimizer: BlockwiseOptimizer, ours: Mapping[str, Any], taken: Mapping[str, Any], number: int
) -> None:
    """Options that decide which moments there are must agree before anything is loaded."""
    if set(optimizer.rule({**ours, **taken}).moments) != set(optimizer.rule(ours).moments):
        different = [key for key in ("momentum", "centered") if key in taken and taken[key] != ours[key]]
        words = ", ".join(f"{key}={taken[key]!r} (here {ours[key]!r})" for key in different)
        raise ConfigurationError(
            f"group {number} of the state dict has {words}, which decides what is kept per parameter; "
            "build the optimizer with the state dict's values"
        )
    if ours["percentile_clipping"] < HISTORY:
        raise ConfigurationError(
            f"group {number} has percentile_clipping={ours['percentile_clipping']}, and the state dict no history of "
            "norms for it; use percentile_clipping=100, which turns it off"
        )


def _kept(read: Mapping[str, Moment], place: Place, peer: Peer) -> dict[str, Tensor]:
    """The moments as we keep them: what the optimizer asks for, as far as that loses nothing or may."""
    group = place.group
    wants_8bit = group["bits"] == 8 and place.param.numel() >= group["min_8bit_size"]
    is_quantised = any(moment.absmax is not None for moment in read.values())
    if not wants_8bit or not (is_quantised or place.lossy):
        if wants_8bit and not peer.keeps_32bit:
            raise place.refuse("the state", "is in 32 bits; pass lossy=True to quantise it, or set the group's bits=32")
        return {key: moment.decoded() for key, moment in read.items()}
    kept = dict[str, Tensor]()
    for key, moment in read.items():
        ours = recoded(moment, place.moments[key], group["block_size"], key, place)
        kept |= {key + CODES: ours.values, f"{key}_absmax": ours.scales}
    return kept


def _held(state: Mapping[str, Any], place: Place) -> dict[str, Moment]:
    """The moments of a state of ours."""
    if "grad_norms" in state and not place.lossy:
        raise place.refuse(
            "grad_norms", "is a history of percentile clipping, which is ours alone; lossy=True drops it"
        )
    if not is_8bit(state):
        return {key: Moment(state[key], signed) for key, signed in place.moments.items()}
    return {
        key: Moment(state[key + CODES], signed, state[f"{key}_absmax"].view(-1), place.group["block_size"])
        for key, signed in place.moments.items()
    }


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Go on after a problem, so that all are told together."""
    try:
        yield
    except ConfigurationError as error:
        problems += error.problems
