"""The embedding layer that keeps 8-bit training stable."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["StableEmbedding"]


class StableEmbedding(nn.Embedding):
    """An embedding with Xavier-uniform weights whose output is layer-normalised.

    Embedding gradients are sparse in effect: most rows get none, a few large ones, and both would share quantisation
    blocks. The initialisation has no outliers, the norm bounds the output's variance, and ``parameter_groups``, given
    the model, keeps 32-bit state for the weight. Add position embeddings to the output, not before.

    The norm runs in fp32, under autocast and in a bf16 model too; its result takes the weight's dtype. There are no
    sparse gradients: the optimizers need dense ones.

    Shapes: int ``[...]`` to ``[..., embedding_dim]``, in the dtype of the weight.

    Source: arXiv 2110.02861, section 2.3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.norm = _WideLayerNorm(embedding_dim, device=device)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = self.norm(super().forward(input))
        return normed


class _WideLayerNorm(nn.LayerNorm):
    """In fp32 at least, whatever the dtypes of input and weights and whatever autocast says."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        scale, shift = self.weight.to(wide), self.bias.to(wide)
        with torch.autocast(input.device.type, enabled=False):
            normed = functional.layer_norm(input.to(wide), self.normalized_shape, scale, shift, self.eps)
        return normed.to(input.dtype)
