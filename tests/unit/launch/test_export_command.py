"""Exported folders, opened by transformers and PEFT themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from holdfast import adapters
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.export_command import export_command
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.adapting import AdapterTask, find_bricks
from holdfast.trainer.config import AdapterConfig, ModelConfig, ModelKind
from holdfast.trainer.export import export_weights
from holdfast.trainer.frozen import Frozen
from holdfast.trainer.model import Decoder
from holdfast.trainer.models import model_of
from tests.support.hf_models import hf_config, transformers, write_model

pytestmark = pytest.mark.timeout(240)  # the first import of transformers, on a machine with other work

_TEXT = "héllo\n wörld €"
_TINY = ModelConfig(name="tiny", d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=64)


def _run(root: Path, model: ModelConfig, *, trained: bool = True, **parts: Any) -> tuple[RunDir, torch.nn.Module]:
    """A run that has ended, and its model."""
    config = RunConfig(root=str(root), project="test", model=model, **parts)
    run = RunDir.create(str(root), "test", "one", config_digest="0")
    run.begin_attempt(
        config=to_plain(config),
        overrides=["trainer.max_steps=300"],
        command=["holdfast", "train"],
        versions={"holdfast": "0.1.0"},
        data="local: a few poems, 1.2 MB, digest 9c1e…, PSF-2.0",
    )
    run.end_attempt("finished", 0, step=300, findings={"bits_per_byte": 2.4125})
    whole = model_of(model).build(7)
    if trained:
        weights = {name: p.detach() for name, p in whole.named_parameters()}
        export_weights(weights, run.export / "model.safetensors", metadata={"format": "pt", "step": "300"})
    return run, whole


def _tokens() -> torch.Tensor:
    return torch.randint(259, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_decoder_becomes_a_llama_with_the_same_logits(tied: bool, tmp_path: Path) -> None:
    model = ModelConfig(**{**{f: getattr(_TINY, f) for f in _TINY.__slots__}, "tie_embeddings": tied})
    run, ours = _run(tmp_path, model)
    assert export_command([str(run.path), "--to", "hf"]) == 0
    folder = run.export / "hf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        expected, got = ours(_tokens()), theirs(_tokens()).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=4e-7 * float(expected.abs().max()))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118  # no mapping
    settings = json.loads((folder / "generation_config.json").read_bytes())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (256, 257, 258)


def test_the_byte_tokenizer_opens_in_transformers_and_returns_every_text(tmp_path: Path) -> None:
    run, _ = _run(tmp_path, _TINY)
    export_command([str(run.path), "--to", "hf", "--output", str(tmp_path / "out")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer(_TEXT)["input_ids"] == list(_TEXT.encode())
    assert tokenizer.decode(tokenizer(_TEXT)["input_ids"]) == _TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_bf16_weights_are_the_rounded_ones(tmp_path: Path) -> None:
    run, ours = _run(tmp_path, _TINY)
    export_command([str(run.path), "--to", "hf", "--dtype", "bf16"])
    with safe_open(run.export / "hf" / "model.safetensors", framework="pt") as file:
        tensor = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(tensor, ours.get_parameter("blocks.1.feed_forward.w_down.weight").bfloat16())
    assert "bfloat16" in (run.export / "hf" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2"])
def test_a_model_of_transformers_keeps_its_class_its_bits_and_its_logits(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", kind)
    run, ours = _run(tmp_path / "runs", hf_config(tmp_path / "model"))
    export_command([str(run.path), "--to", "hf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.export / "hf", local_files_only=True)
    assert type(theirs) is type(ours.inner)
    with torch.no_grad():
        assert torch.equal(theirs(_tokens()).logits, ours.eval()(_tokens()))


def test_the_card_says_what_was_trained_on_what_and_how_well(tmp_path: Path) -> None:
    run, _ = _run(tmp_path, _TINY)
    export_command([str(run.path), "--to", "hf"])
    card = (run.export / "hf" / "README.md").read_text()
    for fact in ("LlamaForCausalLM", "a few poems", "2.413 bits per byte", "step 300", "trainer.max_steps=300"):
        assert fact in card, fact


# -- adapters ---------------------------------------------------------------------------------------------------------


def _adapter_run(root: Path, method: str, model: ModelConfig = _TINY) -> tuple[RunDir, Any]:
    base = model_of(model).build(1)
    weights = {name: p.detach() for name, p in base.named_parameters()}
    export_weights(weights, root / "base.safetensors", metadata={})
    config = AdapterConfig(
        method=method,
        options={"rank": 4},
        base=str(root / "base.safetensors"),
        task="law",
        target_modules=["all-linear"],
    )
    task = AdapterTask(config, model, 5, Frozen(find_bricks(config).files), list)
    begun = task.begin(torch.device("cpu"))
    trained = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05
        for name, p in begun.named_parameters()
        if p.requires_grad
    }
    finished = task.finish(trained)
    run, _ = _run(root / "runs", model, trained=False, adapter=config)
    task.save(finished, run.export / "adapter")
    return run, finished


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers in the old way
def test_a_lora_opens_in_peft_on_the_exported_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    run, ours = _adapter_run(tmp_path, "lora")
    export_command([str(run.path), "--to", "peft"])
    whole, _ = _run(tmp_path / "base_run", _TINY)
    export_weights(_loaded(tmp_path / "base.safetensors"), whole.export / "model.safetensors", metadata={"step": "1"})
    export_command([str(whole.path), "--to", "hf"])
    base = transformers.AutoModelForCausalLM.from_pretrained(whole.export / "hf", local_files_only=True)
    theirs = peft.PeftModel.from_pretrained(base, run.export / "peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(_tokens()).logits, ours(_tokens()), rtol=0, atol=2e-6)


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


def test_a_lora_is_merged_into_a_whole_model(tmp_path: Path) -> None:
    run, ours = _adapter_run(tmp_path, "lora")
    export_command([str(run.path), "--to", "hf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.export / "hf", local_files_only=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(_tokens()).logits, ours(_tokens()), rtol=0, atol=2e-6)


def test_adapters_of_a_model_of_transformers_keep_its_names(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    run, ours = _adapter_run(tmp_path, "lora", hf_config(tmp_path / "model"))
    export_command([str(run.path), "--to", "peft"])
    again = model_of(hf_config(tmp_path / "model")).build(1)
    adapters.load_peft(again, run.export / "peft")
    assert torch.equal(again.eval()(_tokens()), ours(_tokens()))


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_what_depends_on_the_token_is_neither_merged_nor_called_a_lora(form: str, tmp_path: Path) -> None:
    run, _ = _adapter_run(tmp_path, "mora")
    with pytest.raises(ConfigurationError, match="mora"):
        export_command([str(run.path), "--to", form])
    assert not (run.export / form).exists()


# -- what is refused --------------------------------------------------------------------------------------------------


def _refused(words: list[str], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        export_command(words)


def test_an_export_overwrites_nothing_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    run, _ = _run(tmp_path, _TINY)
    (tmp_path / "mine").mkdir()
    _refused([str(run.path), "--to", "hf", "--output", str(tmp_path / "mine")], "exists already")
    _refused([str(run.path), "--to", "peft"], "has trained a whole model and no adapter")
    _refused([str(run.path), "--to", "hf", "--step", "7"], "no complete checkpoint of step 7")
    _refused([str(run.path), "--to", "gguf"], "gguf")
    (run.export / "model.safetensors").write_bytes(b"torn")
    _refused([str(run.path), "--to", "hf"], "cannot be read")
    assert sorted(path.name for path in run.export.iterdir()) == ["model.safetensors"]


def test_the_users_own_module_has_no_class_to_export_to(tmp_path: Path) -> None:
    model = ModelConfig(kind=ModelKind.MODULE, path="tests.support.own_model:build")
    run, _ = _run(tmp_path, model)
    _refused([str(run.path), "--to", "hf"], "is no class of transformers")


def test_decoder_is_still_what_a_run_without_a_choice_trains() -> None:
    assert type(model_of(ModelConfig()).build(0)) is Decoder
