"""Models of transformers in the trainer: the peer is transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from holdfast.trainer.config import ModelConfig, ModelInit, ModelKind
from holdfast.trainer.models import model_of
from tests.support.hf_models import KINDS, hf_config, transformers, write_model

pytestmark = pytest.mark.timeout(240)  # the first import of transformers, on a machine with other work


def _tokens() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(259, (2, 17), generator=torch.Generator().manual_seed(3))
    return text[:, :-1], text[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    peer = write_model(tmp_path, kind)
    model = model_of(hf_config(tmp_path, ModelInit.WEIGHTS)).build(0)
    tokens, targets = _tokens()
    assert torch.equal(model(tokens), peer(tokens).logits)
    whole = torch.cat((tokens[:, :1], targets), 1)  # transformers shifts the labels itself
    theirs, ours = peer(whole, labels=whole).loss, model(tokens, targets)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for (name, own), (_, same) in zip(model.named_parameters(), peer.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, same.grad, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_count_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    peer = write_model(tmp_path, kind)
    known = model_of(hf_config(tmp_path))
    assert [name for name, _ in known.build(0).named_parameters()] == [name for name, _ in peer.named_parameters()]
    assert known.parameters == sum(p.numel() for p in peer.parameters())
    assert (known.vocab_size, known.max_seq_len, known.d_model) == (259, 64, 32)


def test_fresh_weights_are_a_function_of_the_seed_and_leave_the_generator_alone(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    known = model_of(hf_config(tmp_path))
    before = torch.get_rng_state()
    one, same, other = (dict(known.build(seed).named_parameters()) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_rotary_frequencies_stay_exact_in_bf16(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    model = model_of(hf_config(tmp_path)).build(0)
    exact = model.get_buffer("model.rotary_emb.inv_freq").clone()
    model.to(torch.bfloat16)
    assert model.get_parameter("lm_head.weight").dtype is torch.bfloat16
    assert torch.equal(model.get_buffer("model.rotary_emb.inv_freq"), exact)
    assert model(_tokens()[0]).dtype is torch.bfloat16


def test_training_mode_reaches_the_model_itself(tmp_path: Path) -> None:
    write_model(tmp_path, "gpt2", resid_pdrop=0.5)
    model, tokens = model_of(hf_config(tmp_path)).build(0), _tokens()[0]
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_recomputed_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    tokens, targets = _tokens()
    grads = []
    for recomputes in (False, True):
        model = model_of(hf_config(tmp_path, activation_checkpointing=recomputes)).build(0)
        model(tokens, targets).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- what is refused --------------------------------------------------------------------------------------------------


def _problem(config: ModelConfig) -> str:
    (problem,) = model_of(config).problems()
    return problem


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    assert "holds no config.json" in _problem(hf_config(tmp_path))
    assert "absolute" in _problem(ModelConfig(kind=ModelKind.HF, path="models/tiny"))


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llamb"}))
    assert "llamb" in _problem(hf_config(tmp_path))


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "evil.py").write_text("raise SystemExit('this code has run')\n")
    assert str(tmp_path) in _problem(hf_config(tmp_path))


def test_a_model_that_is_no_causal_one_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8).save_pretrained(tmp_path)
    assert "'t5' is no causal language model" in _problem(hf_config(tmp_path))


def test_sizes_of_the_decoder_are_refused_beside_a_model_that_has_its_own(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    assert "model.d_model=64 is of the built-in decoder" in _problem(hf_config(tmp_path, d_model=64))


def test_options_of_other_models_are_refused_beside_the_decoder() -> None:
    assert "model.path='/m' is not read by the built-in decoder" in _problem(ModelConfig(path="/m"))
