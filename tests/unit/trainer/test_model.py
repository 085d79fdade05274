"""The decoder against a reference written from the papers, then what the trainer relies on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import ConfigurationError, InvariantViolation
from holdfast.trainer import model as module
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, Head, generate, initial_weight, initialise
from tests.support.reference_decoder import reference_gradients, reference_logits, reference_loss

_VOCAB = 259
_TINY = ModelConfig(
    name="tiny", vocab_size=_VOCAB, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=12
)
_SHAPES = {
    "grouped": _TINY,
    "one key head": replace(_TINY, n_kv_heads=1, rope_theta=100.0),
    "no groups": replace(_TINY, n_kv_heads=4, norm_eps=0.1),
    "tied": replace(_TINY, tie_embeddings=True),
}


def _decoder(config: ModelConfig, seed: int = 1) -> Decoder:
    """Weights large enough that no part of the model is close to linear, and norms that are not one."""
    model, draw = Decoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.5 * noise if parameter.ndim == 1 else 0.4 * noise)
    return model


def _tokens(batch: int = 2, length: int = 12, seed: int = 2) -> Tensor:
    return torch.randint(_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _float64(model: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def _gradient(model: Decoder, name: str) -> Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


@pytest.fixture(params=list(_SHAPES))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return _SHAPES[str(request.param)]


# -- against the reference --------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_papers_formulas(config: ModelConfig) -> None:
    model, tokens = _decoder(config), _tokens()
    want = torch.stack([reference_logits(config, _float64(model), row) for row in tokens.tolist()])
    have = model(tokens)
    assert (have.dtype, have.shape) == (torch.float32, (2, 12, _VOCAB))
    torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=2e-5)
    assert want.abs().max() > 1  # otherwise the tolerance above would forgive anything


def test_the_loss_is_the_mean_negative_log_likelihood(config: ModelConfig) -> None:
    model, tokens, targets = _decoder(config), _tokens(length=5), _tokens(length=5, seed=3)
    want = reference_loss(config, _float64(model), tokens.tolist(), targets.tolist())
    loss = model(tokens, targets)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


def test_gradients_are_those_of_the_papers_formulas(config: ModelConfig) -> None:
    model, tokens, targets = _decoder(config), _tokens(length=5), _tokens(length=5, seed=3)
    want = reference_gradients(config, _float64(model), tokens.tolist(), targets.tolist())
    model(tokens, targets).backward()
    assert want.keys() == dict(model.named_parameters()).keys()
    for name, gradient in want.items():
        error = torch.linalg.norm(_gradient(model, name) - gradient)
        assert error < 1e-5 * torch.linalg.norm(gradient), name


def test_the_reference_has_the_gradient_of_its_own_loss() -> None:
    weights = _float64(_decoder(_TINY))
    tokens, targets = _tokens(1, 3).tolist(), _tokens(1, 3, seed=3).tolist()
    gradient = reference_gradients(_TINY, weights, tokens, targets)
    for name, index in [("blocks.0.attention.wk.weight", (3, 2)), ("blocks.1.feed_forward_norm.weight", (4,))]:
        losses = []
        for shift in (1e-5, -1e-5):
            moved = weights[name].clone()
            moved[index] += shift
            losses.append(reference_loss(_TINY, {**weights, name: moved}, tokens, targets).item())
        assert gradient[name][index].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_rotary_angles_stay_exact_to_the_end_of_a_long_sequence() -> None:
    positions = torch.tensor([0, 1, 1023, 8191])
    cos, sin = module.rotary_tables(positions, 64, 10000.0)
    for row, position in enumerate(positions.tolist()):
        for pair in range(32):
            angle = position * 10000.0 ** (-2 * pair / 64)
            assert cos[row, pair].item() == pytest.approx(math.cos(angle), abs=1e-3)
            assert sin[row, pair].item() == pytest.approx(math.sin(angle), abs=1e-3)


def test_a_score_depends_on_the_distance_of_two_tokens_only() -> None:
    query, key = (torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    def score(at: int, other: int) -> float:
        turned = [
            module.rotate(x, *module.rotary_tables(torch.tensor([position]), 16, 100.0))
            for x, position in ((query, at), (key, other))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-2)


def test_it_computes_what_transformers_computes_with_the_same_weights() -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(_TINY, n_layers=3, rope_theta=5e5)
    model, tokens = _decoder(config), _tokens()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=_VOCAB,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
        )
    )
    llama.load_state_dict({_name_in_transformers(name): w for name, w in model.state_dict().items()})
    torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=1e-4, atol=1e-4)


_TRANSFORMERS = {
    "embedding": "model.embed_tokens",
    "head.norm": "model.norm",
    "head.output": "lm_head",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.w": "self_attn.",
    "feed_forward.w_": "mlp.",
}


def _name_in_transformers(name: str) -> str:
    for ours, theirs in _TRANSFORMERS.items():
        name = name.replace(ours, theirs)
    last = name.rsplit(".", 2)[-2]
    return name.replace(f".{last}.", f".{last}_proj.") if ".self_attn." in name or ".mlp." in name else name


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_never_influence_earlier_logits(config: ModelConfig, dtype: torch.dtype) -> None:
    model, tokens = _decoder(config).to(dtype), _tokens(1)
    before = model(tokens)
    for cut in (1, 5, 11):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % _VOCAB
        after = model(changed)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.isclose(after[:, cut:], before[:, cut:]).all(-1).any()


def test_sequences_of_a_batch_do_not_meet() -> None:
    model, tokens = _decoder(_TINY), _tokens(3)
    together = model(tokens)
    for row in range(3):
        torch.testing.assert_close(model(tokens[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
    tied, tokens, targets = _decoder(_SHAPES["tied"]), _tokens(), _tokens(seed=3)
    assert "head.output.weight" not in dict(tied.named_parameters())
    apart = Decoder(_TINY)
    apart.load_state_dict(tied.state_dict())
    tied(tokens, targets).backward()
    apart(tokens, targets).backward()
    both = _gradient(apart, "embedding.weight") + _gradient(apart, "head.output.weight")
    torch.testing.assert_close(_gradient(tied, "embedding.weight"), both)


def test_a_tied_decoder_takes_its_table_once_or_twice_but_never_half_of_its_weights() -> None:
    model, tokens = _decoder(_SHAPES["tied"]), _tokens()
    for weights in (model.state_dict(), dict(model.named_parameters())):
        other = Decoder(_SHAPES["tied"])
        other.load_state_dict(weights)
        assert other.head.output.weight is other.embedding.weight
        assert torch.equal(other(tokens), model(tokens))
    assert "head.output.weight" not in dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        Decoder(_SHAPES["tied"]).load_state_dict({"head.norm.weight": model.head.norm.weight})
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.output\.weight"):
        Decoder(_TINY).load_state_dict(dict(model.named_parameters()))


@contextmanager
def _counted_blocks(model: Decoder) -> Iterator[list[str]]:
    calls: list[str] = []
    hooks = [
        block.get_submodule("attention").register_forward_hook(lambda *_, n=number: calls.append(f"block {n}"))
        for number, block in enumerate(model.blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(dtype: torch.dtype) -> None:
    results: list[list[Tensor]] = []
    for is_on in (False, True):
        model = _decoder(replace(_TINY, activation_checkpointing=is_on)).to(dtype)
        with _counted_blocks(model) as calls:
            loss = model(_tokens(), _tokens(seed=3))
            loss.backward()
        assert calls == (["block 0", "block 1", "block 1", "block 0"] if is_on else ["block 0", "block 1"])
        results.append([loss.detach(), *(_gradient(model, name) for name, _ in model.named_parameters())])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


def test_what_is_random_in_a_block_is_recomputed_as_it_was() -> None:
    """Nothing in a block is, until an adapter with dropout is put into one."""

    def gradients(*, is_on: bool) -> list[Tensor]:
        model = _decoder(replace(_TINY, activation_checkpointing=is_on))
        for block in model.blocks:
            block.feed_forward.w_down = nn.Sequential(nn.Dropout(0.5), block.feed_forward.w_down)
        torch.manual_seed(3)
        tokens = torch.arange(2 * 8).view(2, 8)
        model(tokens, tokens).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    assert all(map(torch.equal, gradients(is_on=True), gradients(is_on=False)))


def test_activation_checkpointing_keeps_activations_out_of_memory() -> None:
    def saved_bytes(is_on: bool) -> int:
        sizes: list[int] = []
        model = _decoder(replace(_TINY, activation_checkpointing=is_on))
        parameters = {p.data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(0 if tensor.data_ptr() in parameters else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(_tokens(), _tokens(seed=3))
        return sum(sizes)

    assert saved_bytes(True) < 0.6 * saved_bytes(False)


def test_without_gradients_nothing_is_recomputed() -> None:
    model = _decoder(replace(_TINY, activation_checkpointing=True))
    with _counted_blocks(model) as calls, torch.no_grad():
        model(_tokens(), _tokens(seed=3))
    assert calls == ["block 0", "block 1"]


def test_bf16_weights_give_bf16_logits_and_an_fp32_loss_close_to_fp32(config: ModelConfig) -> None:
    exact, model = _decoder(config), _decoder(config).bfloat16()
    tokens, targets = _tokens(), _tokens(seed=3)
    logits, loss = model(tokens), model(tokens, targets)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert {_gradient(model, name).dtype for name, _ in model.named_parameters()} == {torch.bfloat16}
    assert loss.item() == pytest.approx(exact(tokens, targets).item(), rel=0.03)
    error = torch.linalg.norm(logits.float() - exact(tokens)) / torch.linalg.norm(exact(tokens))
    assert 0 < error < 0.05


def test_autocast_runs_over_fp32_weights() -> None:
    model, tokens = _decoder(_TINY), _tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, _tokens(seed=3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(tokens, _tokens(seed=3)).item(), rel=0.03)


def test_a_norm_in_bf16_is_the_rounded_norm_in_fp32() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = module.RMSNorm(64, 1e-5)(x.float())
    assert torch.equal(module.RMSNorm(64, 1e-5).bfloat16()(x), exact.bfloat16())


def test_a_sequence_longer_than_the_model_is_refused_with_both_numbers() -> None:
    model = _decoder(_TINY)
    assert model(_tokens(length=12)).shape[1] == 12
    with pytest.raises(ConfigurationError, match=r"13 tokens exceeds model\.max_seq_len=12"):
        model(_tokens(length=13))


def test_every_problem_of_the_configuration_is_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as found:
        Decoder(replace(_TINY, n_heads=5, d_ff=0))
    assert len(found.value.problems) == 3


def test_parts_of_a_pipeline_compose_to_the_decoder(config: ModelConfig) -> None:
    model, tokens = _decoder(config), _tokens()
    first, last = module.Embedding(config), Head(config)
    first.load_state_dict(model.embedding.state_dict())
    last.load_state_dict(model.head.state_dict())
    x = first(tokens)
    for block in model.blocks:
        x = block(x)
    assert torch.equal(last(x), model(tokens))


# -- initial weights --------------------------------------------------------------------------------------------------


def test_matrices_are_nan_until_they_are_filled_and_every_one_gets_filled(config: ModelConfig) -> None:
    model = Decoder(config)
    assert all(p.isnan().all() for p in model.parameters() if p.ndim == 2)
    initialise(model, 0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_weight_depends_on_its_name_seed_and_depth_and_on_nothing_else() -> None:
    torch.manual_seed(5)
    first, other = Decoder(_TINY), Decoder(_TINY)
    initialise(first, 7)
    torch.randn(3)
    reversed_order = list(other.named_parameters())[::-1]
    with torch.no_grad():
        for name, parameter in reversed_order:
            parameter.copy_(initial_weight(name, parameter.shape, seed=7, n_layers=2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_other_names_and_seeds_give_unrelated_weights() -> None:
    def draw(name: str, seed: int) -> Tensor:
        return initial_weight(name, (64, 64), seed=seed, n_layers=2).flatten()

    drawn = [draw("blocks.0.attention.wq.weight", 0), draw("blocks.1.attention.wq.weight", 0)]
    drawn += [draw("blocks.0.attention.wq.weight", 1), draw("blocks.0.attention.wk.weight", 0)]
    between = torch.corrcoef(torch.stack(drawn))
    assert (between - torch.eye(4)).abs().max() < 0.1


def test_drawing_weights_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initialise(Decoder(_TINY), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_residual_outputs_are_scaled_down_with_depth() -> None:
    def std(name: str, n_layers: int) -> float:
        return initial_weight(name, (200, 200), seed=0, n_layers=n_layers).std().item()

    for name in ("attention.wo", "feed_forward.w_down"):
        assert std(f"blocks.3.{name}.weight", 8) == pytest.approx(0.02 / 4, rel=0.03)
    for name in ("blocks.3.attention.wq.weight", "blocks.3.feed_forward.w_up.weight", "embedding.weight"):
        assert std(name, 8) == pytest.approx(0.02, rel=0.03)
    assert torch.equal(initial_weight("head.norm.weight", (5,), seed=0, n_layers=8), torch.ones(5))


def test_an_untrained_model_knows_nothing() -> None:
    model = Decoder(replace(_TINY, d_model=64))
    initialise(model, 0)
    loss = model(_tokens(8), _tokens(8, seed=3))
    assert loss.item() == pytest.approx(math.log(_VOCAB), abs=0.02)


def test_bf16_weights_are_the_rounded_fp32_ones() -> None:
    wide, narrow = Decoder(_TINY), Decoder(_TINY).bfloat16()
    initialise(wide, 4)
    initialise(narrow, 4)
    pairs = zip(wide.parameters(), narrow.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_weights_that_are_not_there_cannot_be_filled(device: str) -> None:
    with torch.device(device):
        model = Decoder(_TINY)
    if device == "cpu":  # what a sharding engine leaves in place of a parameter
        model.head.output.weight.data = torch.empty(0)
    with pytest.raises(InvariantViolation, match="initialise before sharding, and not on meta"):
        initialise(model, 0)


# -- generation -------------------------------------------------------------------------------------------------------


class _Scripted(nn.Module):
    """Logits that depend on the last token only: fixed scores, rotated by it. Notes what it saw."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))
        self.windows: list[list[int]] = []
        self.has_built_graphs = False

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.windows.append(tokens_BT[0].tolist())
        self.has_built_graphs |= torch.is_grad_enabled()
        last = torch.roll(self.scores, int(tokens_BT[0, -1]))
        return torch.stack([torch.full_like(last, math.nan)] * (tokens_BT.shape[1] - 1) + [last])[None]


def _sampled(scores: list[float], n: int, **options: Any) -> list[int]:  # Any: keywords of generate
    return generate(_Scripted(scores), [0], n, max_seq_len=8, **options)


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert _sampled([0.0, 0.1, 3.0, 0.2, 0.3], 6, temperature=0) == [2, 4, 1, 3, 0, 2]


def test_equal_seeds_write_equal_text_and_other_seeds_other_text() -> None:
    model = _decoder(_TINY)
    texts = [generate(model, [5, 6], 20, seed=seed, max_seq_len=12) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(99)
    assert generate(model, [5, 6], 20, seed=1, max_seq_len=12) == texts[0]


def test_top_k_keeps_the_k_likeliest_tokens() -> None:
    scores = [0.0, 3.0, 2.9, 2.8, -1.0]

    def steps(top_k: int) -> set[int]:
        ids = [0, *_sampled(scores, 300, temperature=2.0, top_k=top_k)]
        return {(after - before) % 5 for before, after in pairwise(ids)}

    assert steps(1) == {1}
    assert steps(2) == {1, 2}
    assert steps(0) == steps(5) == steps(99) == {0, 1, 2, 3, 4}


def test_tokens_come_in_proportion_to_their_probabilities_at_the_temperature() -> None:
    logits = torch.tensor([math.log(4.0), 0.0])
    for temperature, share in ((1.0, 4 / 5), (0.5, 16 / 17)):
        draw = torch.Generator().manual_seed(1)
        ids = [module._choose(logits, temperature, 0, draw) for _ in range(4000)]
        assert ids.count(0) / 4000 == pytest.approx(share, abs=0.02)


def test_a_prompt_longer_than_the_window_is_read_from_its_end() -> None:
    model = _Scripted([0.0, 1.0, 0.0])
    generated = generate(model, [0, 1, 2, 0, 1], 3, temperature=0, max_seq_len=4)
    assert generated == [2, 0, 1]
    assert model.windows == [[1, 2, 0, 1], [2, 0, 1, 2], [0, 1, 2, 0]]
    decoder = _decoder(_TINY)
    prompt = _tokens(1, 40)[0].tolist()
    assert generate(decoder, prompt, 5, max_seq_len=12) == generate(decoder, prompt[-12:], 5, max_seq_len=12)


def test_generating_builds_no_graph_and_may_generate_nothing() -> None:
    model = _Scripted([0.0, 1.0])
    assert generate(model, [1], 0, max_seq_len=12) == []
    generate(model, [1], 3, max_seq_len=12)
    assert len(model.windows) == 3
    assert not model.has_built_graphs


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="prompt is empty"):
        generate(_decoder(_TINY), [], 3, max_seq_len=12)
