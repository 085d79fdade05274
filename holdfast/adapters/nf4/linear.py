"""A frozen linear layer of 4-bit weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters.nf4.backends import BACKENDS
from holdfast.adapters.nf4.codes import BLOCK_SIZES, GROUP, Quantised, dequantise, quantise
from holdfast.errors import ConfigurationError

__all__ = ["NF4Linear"]


class NF4Linear(nn.Module):
    """y = W x + b with W as NF4 codes, which are buffers: there is no gradient for it, only through it.

    W is there in full only while it is multiplied: each forward pass dequantises it to the input's dtype, each
    backward pass once more, so that activations are all that a graph keeps. ``to(dtype)`` changes ``compute_dtype`` and
    the bias; the codes and their scales stay bit by bit, since the scales are kept as the bits of their fp32 numbers.

    A new one has zeros, for ``load_state_dict`` to fill. Shapes: [..., D] to [..., O].
    Raises: ConfigurationError for a block size or a backend that does not exist. Source: arXiv 2305.14314, equation 5.
    """

    bias: nn.Parameter | None
    weight: Tensor
    """The codes; called like this so that the layer is found on the device where others have their weight."""
    absmax: Tensor
    absmax_scale: Tensor
    absmax_mean: Tensor
    _like: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        block_size: int = 64,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if block_size not in BLOCK_SIZES or backend not in BACKENDS:
            raise ConfigurationError(
                f"block_size={block_size} must be one of {BLOCK_SIZES}, and backend={backend!r} one of {BACKENDS}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.backend = block_size, backend
        blocks = -(-in_features * out_features // block_size)
        sizes = {
            "weight": ((-(-in_features * out_features // 2),), torch.uint8),
            "absmax": ((blocks,), torch.int8),
            "absmax_scale": ((-(-blocks // GROUP),), torch.int32),
            "absmax_mean": ((), torch.int32),
        }
        for name, (shape, kind) in sizes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))

    @classmethod
    def of(cls, linear: nn.Linear, *, block_size: int = 64, backend: str = "auto") -> NF4Linear:
        """With the nearest codes to a layer's weights, and its own bias. Raises: ConfigurationError as ``quantise``."""
        found = quantise(linear.weight, block_size=block_size)
        new = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            block_size=block_size,
            backend=backend,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        new.weight, new.absmax = found.codes, found.absmax
        new.absmax_scale, new.absmax_mean = found.scale.view(torch.int32), found.mean.view(torch.int32)
        new.bias = linear.bias
        return new.train(linear.training)

    def forward(self, x_PD: Tensor) -> Tensor:
        y_PO: Tensor = _Product.apply(x_PD, self)  # type: ignore[no-untyped-call]  # torch: untyped
        return y_PO if self.bias is None else y_PO + self.bias.to(y_PO.dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [O, D], in ``compute_dtype`` or another one."""
        scale, mean = self.absmax_scale.view(torch.float32), self.absmax_mean.view(torch.float32)
        return dequantise(
            Quantised(self.weight, self.absmax, scale, mean),
            (self.out_features, self.in_features),
            dtype or self.compute_dtype,
            block_size=self.block_size,
            backend=self.backend,
        )

    def dense(self) -> nn.Linear:
        """An ordinary layer with these weights, frozen, and the same bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]  # None is what a layer without one has, too
        return linear.train(self.training)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the weights had, or what the model was last moved to: adapters take it for theirs."""
        return self._like.dtype

    @property
    def size_bytes(self) -> int:
        """Of codes and scales, without the bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block_size={self.block_size}"


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps the codes, not W, for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x_PD, layer.dense_weight(x_PD.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grad_PO,) = gradients
        return grad_PO @ ctx.layer.dense_weight(grad_PO.dtype), None
