"""A decoder of the LLaMA family (arXiv 2302.13971, section 2.2), cut so that a pipeline can split it.

:class:`Embedding`, :class:`Block` and :class:`Head` are complete by themselves; :class:`Decoder` composes them.

Suffixes of tensor names::

    B batch    T sequence    D d_model    F d_ff    V vocabulary
    H query heads    K key and value heads    E size of a head    P pairs in a head, E / 2
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.errors import ConfigurationError, InvariantViolation
from holdfast.trainer import sizing
from holdfast.trainer.config import ModelConfig

__all__ = [
    "RESIDUAL_OUTPUTS",
    "Block",
    "Decoder",
    "Embedding",
    "Head",
    "Layers",
    "generate",
    "initial_weight",
    "initialise",
]

_WEIGHT_STD = 0.02
RESIDUAL_OUTPUTS = ("attention.wo.weight", "feed_forward.w_down.weight")
"""Ends of the names of the matrices of a block that write to the residual stream."""


class Linear(nn.Linear):
    """A matrix without bias, NaN until :func:`initialise` or ``load_state_dict`` fills it.

    torch's own initialisation would draw from the global generator, and be thrown away.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, math.nan)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32, then scale per channel. Source: arXiv 1910.07467, equation 4."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BTD * scale_BT1).to(x_BTD.dtype) * self.weight


def rotary_tables(positions_T: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, P] of the rotary angles, always fp32.

    Computed where they are used: a persistent buffer would be cast with the model to bf16, and would have to be
    moved, sharded and snapshotted. Source: arXiv 2104.09864, equation 34.
    """
    exponents_P = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions_T.device) / head_size
    angles_TP = positions_T.float()[:, None] * theta**-exponents_P
    return angles_TP.cos(), angles_TP.sin()


def rotate(x_BHTE: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Turn the pairs (i, i + P) of each head by their angles: the layout that Hugging Face weights use."""
    first_BHTP, second_BHTP = x_BHTE.chunk(2, dim=-1)
    cos, sin = cos_TP.to(x_BHTE.dtype), sin_TP.to(x_BHTE.dtype)
    return torch.cat((first_BHTP * cos - second_BHTP * sin, second_BHTP * cos + first_BHTP * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention whose query heads share key and value heads in groups (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.d_model // config.n_heads
        self.is_grouped = config.n_kv_heads != config.n_heads
        self.rope_theta = config.rope_theta
        self.wq = Linear(config.d_model, config.d_model)
        self.wk = Linear(config.d_model, config.n_kv_heads * self.head_size)
        self.wv = Linear(config.d_model, config.n_kv_heads * self.head_size)
        self.wo = Linear(config.d_model, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTE, k_BKTE, v_BKTE = (self._split(w(x_BTD)) for w in (self.wq, self.wk, self.wv))
        positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        cos_TP, sin_TP = rotary_tables(positions_T, self.head_size, self.rope_theta)
        out_BHTE = F.scaled_dot_product_attention(
            rotate(q_BHTE, cos_TP, sin_TP),
            rotate(k_BKTE, cos_TP, sin_TP),
            v_BKTE,
            is_causal=True,
            enable_gqa=self.is_grouped,
        )
        out_BTD: Tensor = self.wo(out_BHTE.transpose(1, 2).flatten(2))
        return out_BTD

    def _split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, heads x E] -> [B, heads, T, E]."""
        batch, length, _ = x_BTD.shape
        return x_BTD.view(batch, length, -1, self.head_size).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = Linear(config.d_model, config.d_ff)
        self.w_up = Linear(config.d_model, config.d_ff)
        self.w_down = Linear(config.d_ff, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = F.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD)
        out_BTD: Tensor = self.w_down(hidden_BTF)
        return out_BTD


class Embedding(nn.Embedding):
    """Tokens [B, T] int64 -> hidden [B, T, D]. NaN until it is filled, like :class:`Linear`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab_size, config.d_model)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, math.nan)


class Block(nn.Module):
    """Hidden [B, T, D] -> hidden [B, T, D]; pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        mid_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        out_BTD: Tensor = mid_BTD + self.feed_forward(self.feed_forward_norm(mid_BTD))
        return out_BTD


class Head(nn.Module):
    """Hidden [B, T, D] -> logits [B, T, V] in the parameters' dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        logits_BTV: Tensor = self.output(self.norm(x_BTD))
        return logits_BTV


class Layers(nn.Module):
    """All layers of a decoder or some of them, under the names that they have in the whole one."""

    config: ModelConfig


class Decoder(Layers):
    """Tokens -> logits, or the loss. The matrices are NaN until :func:`initialise` or ``load_state_dict``.

    Tied embeddings are one parameter, ``embedding.weight``; ``load_state_dict`` needs it once.

    Raises: ConfigurationError with every problem of ``config``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if problems := sizing.check(config):
            raise ConfigurationError(problems)
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.output.weight = self.embedding.weight
            self.register_load_state_dict_pre_hook(_fill_in_tied_head)  # type: ignore[no-untyped-call]  # torch: untyped

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with targets the mean negative log-likelihood, nats per target, an fp32 scalar.

        Shapes: tokens and targets int64 [B, T]; target t belongs to token t, so the caller shifts.
        Raises: ConfigurationError for a sequence longer than ``max_seq_len``.
        """
        if tokens_BT.shape[1] > self.config.max_seq_len:
            raise ConfigurationError(
                f"a sequence of {tokens_BT.shape[1]} tokens exceeds model.max_seq_len={self.config.max_seq_len}; "
                "shorten data.seq_len or raise model.max_seq_len"
            )
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = self._through(block, x_BTD)
        logits_BTV: Tensor = self.head(x_BTD)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    def _through(self, block: nn.Module, x_BTD: Tensor) -> Tensor:
        if not (self.config.activation_checkpointing and torch.is_grad_enabled()):
            out_BTD: Tensor = block(x_BTD)
            return out_BTD
        recomputed_BTD: Tensor = checkpoint(block, x_BTD, use_reentrant=False)
        return recomputed_BTD


def _fill_in_tied_head(_: nn.Module, weights: dict[str, Tensor], prefix: str, *__: object) -> None:
    """Weights that were collected by parameter, such as exported ones, hold a tied table once."""
    if prefix + "embedding.weight" in weights:
        weights.setdefault(prefix + "head.output.weight", weights[prefix + "embedding.weight"])


def initial_weight(name: str, shape: Sequence[int], *, seed: int, n_layers: int) -> Tensor:
    """The fp32 start value of one parameter: a function of its name, shape, ``seed`` and the model's depth only.

    Norms are one. Matrices are N(0, 0.02); those that write to the residual stream are divided by
    sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2 report, section 2.3).
    """
    if len(shape) == 1:
        return torch.ones(*shape)
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
    std = _WEIGHT_STD / math.sqrt(2 * n_layers) if name.endswith(RESIDUAL_OUTPUTS) else _WEIGHT_STD
    return torch.randn(*shape, generator=generator) * std


@torch.no_grad()
def initialise(model: Layers, seed: int) -> None:
    """Fill every parameter with :func:`initial_weight`, whatever its device and dtype. Not after sharding."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.numel() == 0:
            raise InvariantViolation(f"{name} holds no weights: initialise before sharding, and not on meta")
        parameter.copy_(initial_weight(name, parameter.shape, seed=seed, n_layers=model.config.n_layers))


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    max_seq_len: int,
) -> list[int]:
    """The ``n`` tokens that follow the prompt, equal for equal weights and ``seed`` on every rank.

    Temperature 0 takes the likeliest token; ``top_k`` 0 samples from all. The window of the last ``max_seq_len``
    tokens is computed anew for each token: slow, but without a cache that could differ from training.

    Raises: ConfigurationError for an empty prompt.
    """
    if not prompt_ids:
        raise ConfigurationError("the prompt is empty; start with at least one token, for example <bos>")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(n):
        window_BT = torch.tensor([ids[-max_seq_len:]], device=device)
        logits_V = model(window_BT)[0, -1].float().cpu()
        ids.append(_choose(logits_V, temperature, top_k, generator))
    return ids[len(prompt_ids) :]


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    values, ids = logits_V.topk(min(top_k, logits_V.numel()) if top_k else logits_V.numel())
    choice = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return int(ids[choice])
