"""Which base weights an adapter was trained on."""

from __future__ import annotations

from torch import Tensor, nn

from holdfast.adapters.adapted import ATTRIBUTE, adapters_of
from holdfast.adapters.tensor_file import tensors_digest

__all__ = ["base_fingerprint", "base_state"]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without adapters and under the names it has without them."""
    layers = adapters_of(model).layers if hasattr(model, ATTRIBUTE) else {}
    own = {f"{name}.base.": f"{name}." for name in layers}
    state = {}
    for name, tensor in model.state_dict().items():
        wrapper = next((prefix for prefix in own if name.startswith(prefix)), None)
        if wrapper is not None:
            state[own[wrapper] + name.removeprefix(wrapper)] = tensor
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            state[name] = tensor
    return state


def base_fingerprint(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of the base, adapters or not: one changed bit changes it."""
    return tensors_digest(base_state(model))
