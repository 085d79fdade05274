"""How ``torch.optim``, bitsandbytes and torchao write down what an optimizer keeps; ``interop`` translates by these.

Written after the state dicts and the sources of torch 2.13, bitsandbytes 0.50 and torchao 0.18. Nothing of the last two
is imported, but for torchao's tensor class, when one has to be made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from holdfast.optim.quantize import block_count, codebook, codebook_name, dequantize_blockwise, quantize_blockwise

__all__ = ["BitsandbytesFormat", "Moment", "Peer", "Place", "TorchAOFormat", "TorchFormat", "recoded"]

_ADAM, _MIXING = ("lr", "betas", "eps", "weight_decay"), ("alpha", "t_alpha", "t_beta3")
"""Options, by the names that all packages give them."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment of one parameter, in 32 or in 8 bits."""

    values: Tensor
    """fp32, or uint8 codes; shaped like the parameter."""
    signed: bool
    absmax: Tensor | None = None
    block_size: int = 0

    @property
    def kind(self) -> str:
        return "32 bits" if self.absmax is None else _words(self.signed, self.block_size)

    @property
    def scales(self) -> Tensor:
        assert self.absmax is not None, "an 8-bit moment has scales"
        return self.absmax

    def decoded(self) -> Tensor:
        if self.absmax is None:
            return self.values
        return dequantize_blockwise(self.values, self.absmax, self.signed, self.block_size)

    def encoded(self, signed: bool, block_size: int, *, nonzero: bool) -> Moment:
        codes, absmax = quantize_blockwise(self.decoded(), signed, block_size, nonzero=nonzero and not signed)
        return Moment(codes, signed, absmax, block_size)


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter of ours and what is said about it."""

    name: str
    param: Tensor
    group: Mapping[str, Any]
    moments: Mapping[str, bool]
    """As in the optimizer's rule: whether each is signed."""
    kind: str
    """Name of the optimizer, without ``8bit``."""
    lossy: bool

    def refuse(self, key: str, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{key} of {self.name} {problem}")


class Peer:
    """How another package writes down what we keep. Methods raise ConfigurationError where they cannot."""

    name: str
    kinds: tuple[str, ...]
    """The classes that it has too, without ``8bit``."""
    keeps_32bit = True
    """Moments in 32 bits were meant to be so, and stay so in an 8-bit optimizer."""

    def options(self, kind: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our options of a parameter group of theirs."""
        raise NotImplementedError

    def read(self, entry: Mapping[str, Any], place: Place) -> tuple[int, dict[str, Moment]] | None:
        """Step and moments of one parameter; None where it has none yet."""
        raise NotImplementedError

    def group(self, kind: str, ours: Mapping[str, Any]) -> dict[str, Any]:
        """Their parameter group of ours, without ``params``."""
        raise NotImplementedError

    def write(self, step: int, moments: Mapping[str, Moment], place: Place) -> dict[str, Any] | None:
        """Their state of one parameter; None where they keep none."""
        raise NotImplementedError


class TorchFormat(Peer):
    """Moments under the names that we use too, in the parameter's dtype."""

    name = "torch.optim"
    kinds: tuple[str, ...] = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad")
    keeps_32bit = False

    _OPTIONS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "AdamW": _ADAM,
        "Adam": _ADAM,
        "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
        "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    }

    def options(self, kind: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
        _check_keys(theirs, self._OPTIONS[kind], kind)
        if theirs.get("amsgrad"):
            raise ConfigurationError("amsgrad=True keeps a third moment, which has no place here; it cannot go over")
        decoupled = theirs.get("decoupled_weight_decay", kind == "AdamW")
        if decoupled != (kind == "AdamW") and theirs["weight_decay"]:
            right = "AdamW" if decoupled else "Adam"
            raise ConfigurationError(f"the state dict has decoupled_weight_decay={decoupled}, as {right} has it here")
        taken = {key: _number(theirs[key]) for key in self._OPTIONS[kind]}
        return taken | ({"maximize": theirs["maximize"]} if "maximize" in theirs else {})

    def read(self, entry: Mapping[str, Any], place: Place) -> tuple[int, dict[str, Moment]] | None:
        held = {key: value for key, value in entry.items() if key != "step" and value is not None}
        if not held and "step" not in entry:  # SGD before its first step or without momentum
            return None
        if set(held) != set(place.moments):
            raise place.refuse("the state", f"has {sorted(held)}, this optimizer keeps {sorted(place.moments)}")
        step = int(entry["step"]) if "step" in entry else 1
        return step, {key: self._moment(key, held[key], place) for key in place.moments}

    def _moment(self, key: str, value: Tensor, place: Place) -> Moment:
        return Moment(_dense(key, value, place).float(), place.moments[key])

    def group(self, kind: str, ours: Mapping[str, Any]) -> dict[str, Any]:
        defaults: dict[str, Any] = getattr(torch.optim, kind)([torch.zeros(1)]).defaults
        return defaults | {key: _number(ours[key]) for key in (*self._OPTIONS[kind], "maximize")}

    def write(self, step: int, moments: Mapping[str, Moment], place: Place) -> dict[str, Any] | None:
        entry = {key: self._value(key, moment, place) for key, moment in moments.items()}
        if place.kind == "SGD":  # no count of steps, no buffer before the first
            return entry if entry and step else None
        return {"step": torch.tensor(float(step)), **entry}

    def _value(self, key: str, moment: Moment, place: Place) -> Tensor:
        return _narrowed(key, moment, place)


class TorchAOFormat(TorchFormat):
    """As torch's Adam, but large moments are tensor subclasses with ``codes``, ``scale`` and ``qmap``."""

    name = "torchao.optim"
    kinds = ("AdamW", "Adam")
    keeps_32bit = True

    def _moment(self, key: str, value: Any, place: Place) -> Moment:  # a tensor, or torchao's tensor subclass
        if hasattr(value, "device_mesh"):
            raise place.refuse(key, "is a DTensor; gather it first (get_optimizer_state_dict, full_state_dict=True)")
        if not hasattr(value, "codes"):
            return super()._moment(key, value, place)
        codes, scale, signed = _dense(key, value.codes, place), value.scale, place.moments[key]
        _check_codebook(key, getattr(value, "qmap", None), signed, place)
        if not scale.numel() or codes.numel() % scale.numel():
            raise place.refuse(key, f"has {scale.numel()} scales for {codes.numel()} codes: no whole blocks")
        return Moment(codes, signed, scale, codes.numel() // scale.numel())

    def group(self, kind: str, ours: Mapping[str, Any]) -> dict[str, Any]:
        if ours["maximize"]:
            raise ConfigurationError(f"maximize=True is not known to {self.name}; negate the loss before you move")
        taken = {key: ours[key] for key in _ADAM}
        return {**taken, "lr": torch.tensor(float(ours["lr"]), dtype=torch.float32), "amsgrad": False}

    def _value(self, key: str, moment: Moment, place: Place) -> Tensor:
        if moment.absmax is None or moment.values.numel() % moment.block_size:
            return super()._value(key, moment, place)
        try:
            kind = import_module("torchao.optim.subclass_8bit").OptimState8bit
        except ImportError as cause:
            raise ConfigurationError("to_torchao needs torchao, for its tensor class: pip install torchao") from cause
        qmap = codebook(moment.signed).to(moment.values.device)
        codes, scale = moment.values.clone(), moment.absmax.clone()
        state: Tensor = kind(codes, scale, qmap, moment.signed, dtype=place.param.dtype)
        return state


class BitsandbytesFormat(Peer):
    """One state with the signed codebook, for some rules a second with the unsigned one; no word on which rule."""

    name = "bitsandbytes"
    kinds = ("AdamW", "Adam", "SGD", "Lion", "RMSprop", "Adagrad", "LAMB", "AdEMAMix")

    _NESTED = "__bnb_optimizer_quant_state__"
    """Where tensors lie, out of the sight of FSDP; older versions have them beside ``step``."""
    _BLOCK = 256
    """Fixed in its kernels; versions before 0.44 had 2048."""
    _TWO: ClassVar[Mapping[str, tuple[int, int | None]]] = {"exp_avg": (1, None), "exp_avg_sq": (2, None)}
    _THREE: ClassVar[Mapping[str, tuple[int, int | None]]] = {
        "exp_avg": (1, 0),
        "exp_avg_slow": (1, 1),
        "exp_avg_sq": (2, None),
    }
    """Moment -> which state, and which row of it where two moments are stacked."""

    def options(self, kind: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
        _check_keys(theirs, (*_ADAM, *(_MIXING if kind == "AdEMAMix" else ())), kind)
        betas, eps, decay = tuple(theirs["betas"]), theirs["eps"], theirs["weight_decay"]
        if len(betas) != (3 if kind == "AdEMAMix" else 2):
            raise ConfigurationError(f"the state dict has betas={betas}, which are not those of {kind}")
        if kind == "Adam" and decay:
            rule = f"bitsandbytes' Adam decouples weight_decay={decay}, Adam here adds it to the gradient"
            raise ConfigurationError(f"{rule}; build AdamW")
        own = {
            # It takes dampening, Nesterov and RMSprop's momentum, and uses none of them.
            "SGD": {"momentum": betas[0], "dampening": 0.0, "nesterov": False},
            "RMSprop": {"alpha": betas[0], "momentum": 0.0, "centered": False, "eps": eps},
            "Adagrad": {"lr_decay": 0.0, "eps": eps},
            "Lion": {"betas": betas},
        }.get(kind, {"betas": betas, "eps": eps})
        mixing = {key: theirs[key] for key in _MIXING} if kind == "AdEMAMix" else {}
        return {"lr": _number(theirs["lr"]), "weight_decay": decay, **own, **mixing}

    def read(self, entry: Mapping[str, Any], place: Place) -> tuple[int, dict[str, Moment]] | None:
        flat = {**entry, **entry.get(self._NESTED, {})}
        if "max1" in flat:
            raise place.refuse("the state", "has one scale per tensor, not per block; such old state cannot go over")
        if "gnorm_vec" in flat and not place.lossy:
            raise place.refuse("gnorm_vec", "is a history of percentile clipping; pass lossy=True to begin a new one")
        slots = self._slots(place)
        have = {key for key in ("state1", "state2") if key in flat}
        if have != {f"state{number}" for number, _ in slots.values()}:
            raise place.refuse("the state", f"has {sorted(have)}; this optimizer has the moments {sorted(slots)}")
        return int(_part(flat, "step", place)), {key: self._moment(key, flat, *at, place) for key, at in slots.items()}

    def _moment(self, key: str, flat: Mapping[str, Any], number: int, row: int | None, place: Place) -> Moment:
        state, signed = flat[f"state{number}"], number == 1
        whole = list(place.param.shape) if row is None else [2, *place.param.shape]
        if list(state.shape) != whole or not state.is_contiguous():
            have = f"{list(state.shape)} with strides {list(state.stride())}"
            raise place.refuse(f"state{number}", f"has the shape {have}; the parameter needs {whole}, contiguous")
        values = state if row is None else state[row]
        if state.dtype != torch.uint8:
            return Moment(values.float(), place.moments[key])
        _check_codebook(f"qmap{number}", flat.get(f"qmap{number}"), signed, place)
        self._check_stack(row, place)
        scales = _part(flat, f"absmax{number}", place)
        absmax = scales if row is None else scales[row]
        return Moment(values, signed, absmax, self._block_size(f"absmax{number}", values, absmax, place))

    def _check_stack(self, row: int | None, place: Place) -> None:
        """Its CUDA and Triton kernels put the second of two stacked moments n // 256 scales behind the first, not
        ceil(n / 256), so that two blocks share one."""
        if row is not None and place.param.numel() % self._BLOCK and not place.lossy:
            size = f"{place.param.numel()} elements, no multiple of {self._BLOCK}"
            shared = "on GPUs bitsandbytes has two blocks of these share a scale"
            raise place.refuse("state1", f"stacks moments of {size}: {shared}; lossy=True takes them as they are")

    def _block_size(self, key: str, codes: Tensor, absmax: Tensor, place: Place) -> int:
        ours: int = place.group["block_size"]
        for size in (ours, *(1 << power for power in range(6, 13))):
            if block_count(codes.numel(), size) == absmax.numel():
                return size
        raise place.refuse(key, f"has {absmax.numel()} entries for {codes.numel()} codes: no block size explains that")

    def _slots(self, place: Place) -> Mapping[str, tuple[int, int | None]]:
        if len(place.moments) == 1:
            return dict.fromkeys(place.moments, (1, None))
        return self._THREE if place.kind == "AdEMAMix" else self._TWO

    def group(self, kind: str, ours: Mapping[str, Any]) -> dict[str, Any]:
        unknown = {"maximize": False, "dampening": 0.0, "nesterov": False, "centered": False, "lr_decay": 0.0}
        unknown |= {"momentum": 0.0} if kind == "RMSprop" else {}
        unknown |= {"weight_decay": 0.0} if kind == "Adam" else {}
        problems = [
            f"{key}={ours[key]!r} of {kind} is not known to bitsandbytes, which would go on with {neutral!r}"
            for key, neutral in unknown.items()
            if key in ours and ours[key] != neutral
        ]
        if kind == "SGD" and not ours["momentum"]:
            problems.append("momentum=0 has no state; bitsandbytes has SGD with momentum only")
        if problems:
            raise ConfigurationError(problems)
        betas = {
            "SGD": (ours.get("momentum"), 0.0),
            "RMSprop": (ours.get("alpha"), 0.0),
            "Adagrad": (0.0, 0.0),
        }.get(kind) or tuple(ours["betas"])
        made = {"lr": _number(ours["lr"]), "betas": betas, "eps": ours.get("eps", 0.0)}
        two = {key: ours.get(key, none) for key, none in zip(_MIXING, (0.0, None, None), strict=True)}
        has_two = kind in ("AdamW", "Adam", "LAMB", "AdEMAMix")
        return {**made, "weight_decay": ours["weight_decay"], **(two if has_two else {})}

    def write(self, step: int, moments: Mapping[str, Moment], place: Place) -> dict[str, Any] | None:
        parts: dict[str, list[Tensor]] = {}
        for key, (number, row) in self._slots(place).items():
            moment = moments[key]
            if moment.absmax is not None:
                self._check_stack(row, place)
                moment = recoded(moment, number == 1, self._BLOCK, key, place)
                parts.setdefault(f"absmax{number}", []).append(moment.scales)
                parts[f"qmap{number}"] = [codebook(number == 1).to(moment.values.device)]
            parts.setdefault(f"state{number}", []).append(moment.values)
        made = {key: torch.stack(some) if len(some) > 1 else some[0].clone() for key, some in parts.items()}
        scratch = {"unorm_vec": torch.zeros(1, device=place.param.device)} if place.kind == "LAMB" else {}
        return {"step": step, self._NESTED: made | scratch}


def recoded(moment: Moment, signed: bool, block_size: int, key: str, place: Place) -> Moment:
    """The moment with this codebook and block size, which it has already or ``lossy`` gives it."""
    if moment.absmax is not None and (moment.signed, moment.block_size) == (signed, block_size):
        return moment
    if place.lossy:
        return moment.encoded(signed, block_size, nonzero=place.group["nonzero_second_moment"])
    problem = f"is kept as {moment.kind} and needs {_words(signed, block_size)}; quantising it anew is lossy"
    others = "" if moment.block_size in (0, block_size) else f", or use block_size={moment.block_size}"
    raise place.refuse(key, f"{problem}: pass lossy=True to do it{others}")


def _narrowed(key: str, moment: Moment, place: Place) -> Tensor:
    """fp32 values in the parameter's dtype, to which torch casts all state that it loads."""
    values, dtype = moment.decoded(), place.param.dtype
    narrow = values.to(dtype, copy=True)
    if not place.lossy and not torch.equal(narrow.float(), values):
        raise place.refuse(key, f"is fp32, and torch keeps it in the parameter's {dtype}; lossy=True rounds it")
    return narrow


def _dense(key: str, value: Any, place: Place) -> Tensor:  # whatever a state dict holds
    if not isinstance(value, Tensor) or value.shape != place.param.shape:
        have = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise place.refuse(key, f"is {have}; the parameter has the shape {list(place.param.shape)}")
    return value.detach()


def _check_codebook(key: str, qmap: Tensor | None, signed: bool, place: Place) -> None:
    """Byte for byte ours, or the codes mean something else."""
    ours = codebook(signed)
    if qmap is None or _digest(qmap) != _digest(ours):
        have = "no codebook" if qmap is None else f"a codebook with SHA-256 {_digest(qmap)}"
        raise place.refuse(
            key, f"has {have}; {codebook_name(signed)} is {_digest(ours)}, so its codes mean other values"
        )


def _words(signed: bool, block_size: int) -> str:
    return f"{codebook_name(signed)} codes in blocks of {block_size}"


def _digest(table: Tensor) -> str:
    """Of the bytes; the first sixteen hexadecimal digits."""
    return hashlib.sha256(bytes(table.detach().cpu().contiguous().view(torch.uint8).tolist())).hexdigest()[:16]


def _check_keys(theirs: Mapping[str, Any], keys: tuple[str, ...], kind: str) -> None:
    missing = [key for key in keys if key not in theirs]
    if missing:
        raise ConfigurationError(f"the state dict's groups have no {', '.join(missing)}: {kind} did not write it")


def _part(entry: Mapping[str, Any], key: str, place: Place) -> Any:  # a tensor, or a count
    if key not in entry:
        raise place.refuse(key, "is missing")
    return entry[key]


def _number(value: Any) -> Any:  # an option of any kind; numbers may be tensors, tuples of them too
    if isinstance(value, Tensor):
        return value.item()
    return tuple(_number(part) for part in value) if isinstance(value, (tuple, list)) else value
