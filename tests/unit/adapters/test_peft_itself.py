"""Against PEFT and transformers, where they are installed: models are made from a config, nothing is downloaded."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    create_method,
    finish_task,
    inject,
    load_peft,
    merge,
    save_peft,
    start_task,
    trainable_parameters,
)
from holdfast.adapters.peft_config import PeftConfig
from holdfast.errors import ConfigurationError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]  # warnings of theirs

_TOKENS = torch.arange(20).view(2, 10)


def _base(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=16)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config)
    return model.to(dtype).eval()


def _randomise(parameters: list[nn.Parameter]) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn_like(parameter) / 4)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(_TOKENS).logits
    return logits


def _theirs(kind: str, at: Path, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """A model of PEFT with random numbers, and its folder."""
    peft = pytest.importorskip("peft")
    model: nn.Module = peft.get_peft_model(_base(kind, dtype), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    _randomise([parameter for name, parameter in model.named_parameters() if "lora_" in name])
    model.save_pretrained(at)
    return model.eval()


def _read_by_peft(kind: str, at: Path) -> nn.Module:
    """Without a warning that keys are missing or unknown."""
    peft = pytest.importorskip("peft")
    base = _base(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch).*")
        model: nn.Module = peft.PeftModel.from_pretrained(base, at)
    return model.eval()


_LAYERS = {"target_modules": ["q_proj", "v_proj"]}
_FOLDERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "lora_alpha": 8, **_LAYERS}),
    ("llama", {"r": 3, "lora_alpha": 5, "use_rslora": True, **_LAYERS}),
    ("llama", {"r": 3, "lora_alpha": 7, "target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    ("llama", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}),
    ("llama", {"layers_to_transform": [0, 2], **_LAYERS}),
    ("llama", {"layers_to_transform": 1, "layers_pattern": "layers", **_LAYERS}),
    ("llama", {"layers_to_transform": 1, "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]}),
    (
        "llama",
        {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"q_proj": 3}, **_LAYERS},
    ),
    ("llama", {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 5}, "use_rslora": True, **_LAYERS}),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    ("gpt2", {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"]}),
    (
        "gpt2",
        {"target_modules": "all-linear", "fan_in_fan_out": True, "use_rslora": True, "init_lora_weights": "gaussian"},
    ),
]


@pytest.mark.parametrize(("kind", "fields"), _FOLDERS)
def test_a_folder_of_peft_computes_merges_and_goes_back_as_in_peft(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = _theirs(kind, tmp_path / "in", **fields)
    want, model = _logits(theirs), _base(kind)
    load_peft(model, tmp_path / "in")
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=1e-10)
    assert float((want - _logits(_base(kind))).abs().max()) > 1e-3

    save_peft(model, tmp_path / "out")
    ours, original = (
        (
            json.loads((at / "adapter_config.json").read_text()),
            safetensors.torch.load_file(at / "adapter_model.safetensors"),
        )
        for at in (tmp_path / "out", tmp_path / "in")
    )
    assert ours[0] == original[0] and ours[1].keys() == original[1].keys()
    assert all(torch.equal(tensor, original[1][key]) for key, tensor in ours[1].items())
    assert torch.equal(_logits(_read_by_peft(kind, tmp_path / "out")), _logits(_read_by_peft(kind, tmp_path / "in")))

    merged = merge(model)
    full = theirs.merge_and_unload().state_dict()  # type: ignore[operator]
    for name, weight in merged.items():
        torch.testing.assert_close(weight, full[name], rtol=0, atol=1e-12)
    changed = {name for name, tensor in full.items() if not torch.equal(tensor, model.state_dict()[name])}
    assert changed == merged.keys()
    model.load_state_dict(merged, strict=False)
    model.save_pretrained(tmp_path / "full")  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path / "full", dtype=torch.float64)  # type: ignore[attr-defined]
    torch.testing.assert_close(_logits(again), want, rtol=0, atol=1e-10)


_NAMES = [
    f"{before}{block}.{after}"
    for before in ("layers.", "model.layers.", "model.enc.h.")
    for block in range(2)
    for after in ("q", "mlp.up", "experts.0.up", "experts.1.xup")
] + ["q", "head.up"]


def _tree() -> nn.Module:
    root = nn.Module()
    for name in _NAMES:
        parent = root
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(1, 1))
    return root


_ENDS = st.lists(
    st.sampled_from(["q", "up", "mlp.up", "0.up", "head.up", "layers.0.q", "model.layers.1.mlp.up"]), min_size=1
)


@given(
    choice=_ENDS | st.sampled_from(["all-linear", r".*\.q", r"model\..*up", "q|head.up"]),
    exclude=st.none() | _ENDS | st.sampled_from([r".*experts.*", "q"]),
    blocks=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2)),
    lists=st.sampled_from([None, [], "layers", "h", ["h", "layers"], "enc.h"]),
)
def test_the_layers_are_those_that_peft_chooses(choice: Any, exclude: Any, blocks: Any, lists: Any) -> None:
    peft = pytest.importorskip("peft")
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    narrowing = (
        {} if isinstance(choice, str) else {"layers_to_transform": blocks, "layers_pattern": lists if blocks else None}
    )
    fields = {"target_modules": choice, "exclude_modules": exclude, **narrowing}
    theirs = peft.LoraConfig(**fields)
    if choice == "all-linear":
        theirs.target_modules = set(_NAMES)
    tree = _tree()
    found = [(name, utils.check_target_module_exists(theirs, name)) for name, _ in tree.named_modules() if name]
    want = [name for name, is_meant in found if not isinstance(is_meant, utils._ExcludedModule) and is_meant]
    assert PeftConfig({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **fields}, "here").targets(tree) == want


@pytest.mark.parametrize("method", ["lora", "freeze_and_add"])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["q_proj", "down_proj"]), ("llama", r".*\.1\..*|.*\.0\.mlp.*"), ("gpt2", ["c_attn", "mlp.c_proj"])],
)
def test_what_was_trained_here_is_read_by_peft(
    kind: str, targets: str | list[str], method: str, tmp_path: Path
) -> None:
    model = _base(kind)
    inject(model, create_method(method, {"rank": 3, "scale": 1.3}), targets)
    for name in ("a", "b"):
        start_task(model, name)
        _randomise(trainable_parameters(model))
        finish_task(model)
    save_peft(model, tmp_path, task_type="CAUSAL_LM")
    theirs = _read_by_peft(kind, tmp_path)
    torch.testing.assert_close(_logits(theirs), _logits(model), rtol=0, atol=1e-10)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert len(adapted) == len(merge(model))


def test_ranks_that_differ_after_more_training_are_read_by_peft(tmp_path: Path) -> None:
    _theirs("llama", tmp_path / "in", rank_pattern={"v_proj": 2, "1.self_attn.q_proj": 5}, **_LAYERS)
    model = _base("llama")
    load_peft(model, tmp_path / "in", method="freeze_and_add")
    start_task(model, "more")
    _randomise(trainable_parameters(model))
    finish_task(model)
    save_peft(model, tmp_path / "out")
    torch.testing.assert_close(_logits(_read_by_peft("llama", tmp_path / "out")), _logits(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_is_no_plain_lora_in_peft_is_refused(fields: dict[str, Any], rule: str, tmp_path: Path) -> None:
    kind = "gpt2" if "lora_bias" in fields else "llama"
    _theirs(kind, tmp_path, torch.float32, **{**_LAYERS, **fields})
    model = _base(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=rule):
        load_peft(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
