"""Folders of PEFT: written and read here by the format's description, and by PEFT itself where it is installed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    abandon_task,
    adapters_of,
    create_method,
    eject,
    finish_task,
    inject,
    load_adapters,
    load_peft,
    merge,
    save_adapters,
    save_peft,
    start_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.adapters.peft_config import PeftConfig
from holdfast.errors import ConfigurationError, HoldfastError, ManifestMismatch


class Conv1D(nn.Module):
    """As in GPT-2: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8, bias=False)
        self.c_proj = Conv1D(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(self.q_proj(x).tanh())
        return x + y


class Net(nn.Module):
    """Two blocks, and an output layer that answers as one of transformers does."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(3, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(6, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.lm_head(x)
        return y


_BLOCKS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "c_proj")]
_SHAPES = {**{name: (6, 8) if "q_proj" in name else (8, 6) for name in _BLOCKS}, "lm_head": (6, 5)}
_FIELDS: dict[str, Any] = {  # as PEFT 0.17 writes it
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "some/base",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 24,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "c_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
_A, _B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


def _tensors(ranks: dict[str, int], dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    found = {}
    for name, rank in ranks.items():
        d, o = _SHAPES[name]
        found[_A.format(name)] = torch.randn(rank, d, dtype=torch.float64).to(dtype)
        found[_B.format(name)] = torch.randn(o, rank, dtype=torch.float64).to(dtype)
    return found


def _write(at: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    (at / "adapter_config.json").write_text(json.dumps(_FIELDS | fields))
    safetensors.torch.save_file(tensors, at / "adapter_model.safetensors", metadata={"format": "pt"})
    return at


def _read(at: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((at / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(at / "adapter_model.safetensors")


def _by_hand(model: Net, x: Tensor, tensors: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    """y = W x + b + c B A x in every adapted layer, W as [out, in]; float64."""

    def layer(name: str, x: Tensor) -> Tensor:
        module = model.get_submodule(name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        y = torch.einsum("oi,pi->po", weight.double(), x)
        if module.bias is not None:
            y = y + module.bias.double()
        if name in scales:
            a, b = tensors[_A.format(name)].double(), tensors[_B.format(name)].double()
            y = y + scales[name] * torch.einsum("or,ri,pi->po", b, a, x)
        return y

    for i in range(2):
        x = x + layer(f"layers.{i}.c_proj", layer(f"layers.{i}.q_proj", x).tanh())
    return layer("lm_head", x)


_X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


@pytest.mark.parametrize(
    ("fields", "ranks", "scales"),
    [
        ({}, [4] * 4, [6.0] * 4),
        ({"lora_alpha": 3.0}, [4] * 4, [0.75] * 4),
        ({"use_rslora": True}, [4] * 4, [12.0] * 4),
        ({"use_rslora": True, "r": 3, "lora_alpha": 5}, [3] * 4, [5 / math.sqrt(3)] * 4),
        ({"rank_pattern": {"q_proj": 2}}, [2, 4, 2, 4], [12.0, 6.0, 12.0, 6.0]),
        ({"rank_pattern": {"layers.1.q_proj": 6, "q_proj": 2}}, [2, 4, 6, 4], [12.0, 6.0, 4.0, 6.0]),
        ({"rank_pattern": {"^layers.0.q_proj": 1}, "use_rslora": True}, [1, 4, 4, 4], [24.0, 12.0, 12.0, 12.0]),
        ({"alpha_pattern": {r"layers\.\d\.c_proj": 10}}, [4] * 4, [6.0, 2.5, 6.0, 2.5]),
        ({"rank_pattern": {"1.c_proj": 5}, "alpha_pattern": {"c_proj": 15}}, [4, 4, 4, 5], [6.0, 3.75, 6.0, 3.0]),
        ({"rank_pattern": {"proj": 2}}, [4] * 4, [6.0] * 4),
    ],
)
def test_a_folder_computes_what_its_formula_says_and_merges_into_that(
    fields: dict[str, Any], ranks: list[int], scales: list[float], tmp_path: Path
) -> None:
    tensors, factor = _tensors(dict(zip(_BLOCKS, ranks, strict=True))), dict(zip(_BLOCKS, scales, strict=True))
    base = Net().double()
    want = _by_hand(base, _X, tensors, factor)
    model = copy.deepcopy(base)
    adapters = load_peft(model, _write(tmp_path, tensors, **fields))
    assert list(adapters.layers) == _BLOCKS and adapters.tasks == ["peft"] and adapters.method.name == "lora"
    assert adapters.method.dropout == 0.05
    torch.testing.assert_close(model.eval()(_X), want, rtol=0, atol=1e-11)
    assert not torch.allclose(base(_X), want, atol=1e-3)
    weights = merge(model)
    for name in _BLOCKS:
        a, b = tensors[_A.format(name)], tensors[_B.format(name)]
        update = factor[name] * b @ a
        full = base.get_submodule(name).weight + (update.T if "c_proj" in name else update)
        torch.testing.assert_close(weights[f"{name}.weight"], full, rtol=0, atol=1e-11)
    model.load_state_dict(weights, strict=False)
    torch.testing.assert_close(model(_X), want, rtol=0, atol=1e-11)


_DTYPES = ["float64", "float32", "bfloat16", "float16"]


@settings(max_examples=60, deadline=None)
@given(
    stored=st.sampled_from(_DTYPES),
    running=st.sampled_from(_DTYPES),
    alpha=st.integers(1, 40) | st.floats(0.1, 9.0),
    r=st.integers(1, 7),
    is_stabilised=st.booleans(),
    method=st.sampled_from(["lora", "freeze_and_add", "olora", "oracle"]),
    seed=st.integers(0, 99),
)
def test_what_was_read_is_written_bit_by_bit(
    stored: str,
    running: str,
    alpha: float,
    r: int,
    is_stabilised: bool,
    method: str,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    at = tmp_path_factory.mktemp("peft")
    tensors = _tensors(dict.fromkeys(_BLOCKS, r), getattr(torch, stored), seed)
    _write(at / "in", tensors, r=r, lora_alpha=alpha, use_rslora=is_stabilised)
    model = Net().to(getattr(torch, running))
    load_peft(model, at / "in", method=method)
    save_peft(copy.deepcopy(model), at / "out")
    config, found = _read(at / "out")
    assert config == _read(at / "in")[0]
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
    with safetensors.safe_open(at / "out/adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"target_modules": ["q_proj"]}, ["layers.0.q_proj", "layers.1.q_proj"]),
        ({"target_modules": ["layers.1.q_proj", "0.c_proj"]}, ["layers.0.c_proj", "layers.1.q_proj"]),
        ({"target_modules": r".*layers\.1\..*|net\.lm_head"}, ["layers.1.q_proj", "layers.1.c_proj", "lm_head"]),
        ({"target_modules": "all-linear"}, _BLOCKS),
        ({"target_modules": "all-linear", "exclude_modules": ["c_proj"]}, ["layers.0.q_proj", "layers.1.q_proj"]),
        ({"target_modules": ["c_proj", "q_proj"], "exclude_modules": r".*\.0\..*"}, _BLOCKS[2:]),
        ({"target_modules": ["c_proj", "q_proj"], "layers_to_transform": 1}, _BLOCKS[2:]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, _BLOCKS[:1]),
        ({"target_modules": ["net.layers.0.q_proj", "c_proj"], "layers_to_transform": [1]}, [_BLOCKS[0], _BLOCKS[3]]),
        ({"target_modules": ["lm_head"], "fan_in_fan_out": None, "lora_dropout": None}, ["lm_head"]),
    ],
)
def test_layers_are_those_that_the_config_chooses(fields: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    # The real model hides its blocks one level deeper, and so does this one, for layers_to_transform.
    tensors = {
        key.replace("model.model.", "model.model.net."): t for key, t in _tensors(dict.fromkeys(names, 4)).items()
    }
    model = nn.Module()
    model.net, model.get_output_embeddings = Net(), lambda: model.net.lm_head  # type: ignore[assignment]
    _write(tmp_path / "in", tensors, **fields)
    assert list(load_peft(model, tmp_path / "in").layers) == [f"net.{name}" for name in names]
    save_peft(model, tmp_path / "out")
    assert _read(tmp_path / "out")[0] == _FIELDS | fields


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"use_dora": True}, "use_dora=True cannot be represented: DoRA rescales the base weight.*merge_and_unload"),
        ({"bias": "all"}, "bias='all' cannot be represented: biases were trained too.*merge_and_unload"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True cannot be represented: it adds a bias to B"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be represented: whole layers"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"target_parameters": ["experts.w"]}, "target_parameters="),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"use_qalora": True}, "use_qalora=True is a field that is not known here and may change the result"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is a field that is not known"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base.*path_initial_model_for"),
        ({"peft_type": "LOHA", "r": None}, "peft_type='LOHA' is not 'LORA', which is all that is read; merge [^\n]*$"),
        ({"r": 0}, "r=0 must be a whole number above 0"),
        ({"r": 2.0}, "r=2.0 must be a whole number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a finite number and not 0"),
        ({"lora_alpha": None}, "lora_alpha=None must be"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be at least 0 and below 1"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be true or false"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern=.* must give expressions whole numbers above 0"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern=.* must give expressions"),
        ({"alpha_pattern": [4]}, "alpha_pattern="),
        ({"target_modules": None}, "target_modules=None must be names, an expression or 'all-linear'"),
        ({"target_modules": []}, r"target_modules=\[\] must be names"),
        ({"target_modules": "("}, "target_modules='\\(' must be names"),
        ({"exclude_modules": 3}, "exclude_modules=3 must be names"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all' must be whole numbers"),
        ({"layers_pattern": 1}, "layers_pattern=1 must be names"),
        ({"fan_in_fan_out": True, "target_modules": ["q_proj"]}, "fan_in_fan_out=True says that the base's weights"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(fields: dict[str, Any], rule: str, tmp_path: Path) -> None:
    names = [name for name in _BLOCKS if fields.get("target_modules") != ["q_proj"] or "q_proj" in name]
    at = _write(tmp_path, _tensors(dict.fromkeys(names, 4)), **fields)
    model = Net()
    with pytest.raises(ConfigurationError, match=rf"adapter_config.json: {rule}"):
        load_peft(model, at)
    assert not hasattr(model, "holdfast_adapters") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("lists", "names"),
    [
        (None, ["layers.0.experts.1.q", "net.layers.1.experts.0.q"]),  # the first segment is no list, to PEFT
        ("layers", ["layers.1.experts.0.q", "net.layers.1.experts.0.q"]),
        (r"\w+", ["layers.1.experts.0.q", "net.layers.1.experts.0.q"]),
        (["h", "experts"], ["layers.0.experts.1.q", "net.layers.0.experts.1.q"]),
    ],
)
def test_blocks_are_counted_in_the_outermost_list(lists: Any, names: list[str]) -> None:
    def blocks() -> nn.ModuleList:
        return nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(1, 1)}) for _ in "01")}) for _ in "01"
        )

    model = nn.ModuleDict({"layers": blocks(), "net": nn.ModuleDict({"layers": blocks()})})
    fields = {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": lists}
    found = PeftConfig(_FIELDS | fields, "here").targets(model)
    assert [name for name in found if "1.experts.1" not in name] == names


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    at = _write(tmp_path, {}, use_dora=True, bias="all", r=-1)
    with pytest.raises(ConfigurationError) as caught:
        load_peft(Net(), at)
    assert [p.partition(": ")[2].partition("=")[0] for p in caught.value.problems] == ["r", "bias", "use_dora"]


def test_fields_that_do_not_matter_may_hold_anything_and_transposed_layers_go_with_both_settings(
    tmp_path: Path,
) -> None:
    loose = {"init_lora_weights": "gaussian", "loftq_config": {"loftq_bits": 4}, "new_in_1_0": None, "other": []}
    for fan in (True, False):
        at = _write(tmp_path, _tensors(dict.fromkeys(_BLOCKS, 4)), **loose, fan_in_fan_out=fan)
        load_peft(Net(), at)


def _without(key: str) -> dict[str, Tensor]:
    return {name: t for name, t in _tensors(dict.fromkeys(_BLOCKS, 4)).items() if name != key}


_ONE = _A.format(_BLOCKS[0])


@pytest.mark.parametrize(
    ("tensors", "rule"),
    [
        ({}, "no tensor in it is called base_model.model.<layer>.lora_A.weight"),
        (_without(_ONE), "layers.0.q_proj has lora_B only"),
        (_tensors(dict.fromkeys(_BLOCKS[1:], 4)), "layers.0.q_proj is among target_modules and has no tensors"),
        (_tensors(dict.fromkeys([*_BLOCKS, "lm_head"], 4)), "lm_head is not among target_modules"),
        (
            _tensors(dict.fromkeys(_BLOCKS, 3)),
            r"lora_A and lora_B \[\[3, 6\], \[8, 3\]\], where .* \[\[4, 6\], \[8, 4\]\]",
        ),
        (_without(_ONE) | {_ONE: torch.zeros(4, 7)}, r"\[\[4, 7\], \[8, 4\]\], where"),
        (_without(_ONE) | {_ONE: torch.full((4, 6), float("nan"))}, "not finite in torch.float32"),
        (_without(_ONE) | {_ONE: torch.full((4, 6), 1e300, dtype=torch.float64)}, "not finite in torch.float32"),
        (
            _without("") | {"base_model.model.embed.lora_embedding_A": torch.zeros(1)},
            "lora_embedding_A is no linear layer's",
        ),
        (
            _without("") | {_A.format("x"): torch.zeros(1), _B.format("x"): torch.zeros(1)},
            "x is no module of this model",
        ),
        (
            _without("") | {_A.format("embed"): torch.zeros(1), _B.format("embed"): torch.zeros(1)},
            "embed is a Embedding",
        ),
        (_without("") | {f"k{i}": torch.zeros(1) for i in range(9)}, r"k0 is no (.|\n)*k4 is no .*\n.*: and 4 more$"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_the_files_name(
    tensors: dict[str, Tensor], rule: str, tmp_path: Path
) -> None:
    at, model = _write(tmp_path, tensors), Net()
    with pytest.raises(ManifestMismatch, match=rf"adapter_model.safetensors: .*{rule}"):
        load_peft(model, at)
    assert not hasattr(model, "holdfast_adapters") and all(p.requires_grad for p in model.parameters())


def test_weights_of_the_base_are_kept_if_they_are_the_models_own(tmp_path: Path) -> None:
    base, tensors = Net(), _tensors(dict.fromkeys(_BLOCKS[:1], 4), torch.float32)
    added = {"embed.weight": base.embed.weight, "lm_head.base_layer.weight": base.lm_head.weight}
    tensors |= {f"base_model.model.{name}": weight.detach().clone() for name, weight in added.items()}
    model = copy.deepcopy(base)
    load_peft(model, _write(tmp_path / "in", tensors, target_modules=_BLOCKS[:1]))
    save_peft(model, tmp_path / "out")
    found = _read(tmp_path / "out")[1]
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], t) for key, t in tensors.items())
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-6
    with pytest.raises(ManifestMismatch, match=r"lm_head\.base_layer\.weight is another lm_head\.weight than this"):
        load_peft(other, tmp_path / "in")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no PEFT adapter: it has no adapter_config\.json"):
        load_peft(Net(), tmp_path / "nowhere")
    at = _write(tmp_path, _tensors(dict.fromkeys(_BLOCKS, 4), torch.float32))
    config, tensors = (at / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    whole = tensors.read_bytes()
    for cut in range(0, len(whole), 97):
        tensors.write_bytes(whole[:cut])
        with pytest.raises(ManifestMismatch, match=r"adapter_model.safetensors"):
            load_peft(Net(), at)
    tensors.unlink()
    with pytest.raises(ManifestMismatch, match=r"has no adapter_model.safetensors$"):
        load_peft(Net(), at)
    (at / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ManifestMismatch, match=r"adapter_model.bin is a pickle, which is not read: save it with safe"):
        load_peft(Net(), at)
    for content, rule in (("{", "is no JSON"), ("[]", "holds a list, not an object"), ("\x80", "is no JSON")):
        config.write_text(content, encoding="latin-1")
        with pytest.raises(ManifestMismatch, match=f"adapter_config.json {rule}"):
            load_peft(Net(), at)


def test_a_model_with_adapters_and_a_method_of_another_kind_are_refused(tmp_path: Path) -> None:
    at, model = _write(tmp_path, _tensors(dict.fromkeys(_BLOCKS, 4))), Net()
    for method in ("mora", "inflora", "brainstacks"):
        with pytest.raises(ConfigurationError, match=f"method='{method}' cannot go on from a LoRA; choose lora"):
            load_peft(model, at, method=method)
    with pytest.raises(ConfigurationError, match="task='' must not be empty"):
        load_peft(model, at, task="")
    load_peft(model, at)
    with pytest.raises(ConfigurationError, match="has adapters already"):
        load_peft(model, at)
    tied = Net()
    tied.lm_head = nn.Linear(6, 3, bias=False)
    tied.lm_head.weight = tied.embed.weight
    pair = {_A.format("lm_head"): torch.zeros(4, 6), _B.format("lm_head"): torch.zeros(3, 4)}
    with pytest.raises(ConfigurationError, match="lm_head shares its weight"):
        load_peft(tied, _write(tmp_path, pair, target_modules=["lm_head"]))


# -- what Holdfast has trained ----------------------------------------------------------------------------------------


def _train(model: nn.Module, *names: str) -> nn.Module:
    torch.manual_seed(5)
    for name in names:
        start_task(model, name)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter))
        finish_task(model)
    return model.eval()


@pytest.mark.parametrize("method", ["lora", "freeze_and_add", "olora"])
@pytest.mark.parametrize("tasks", [("a",), ("a", "b", "c")])
def test_trained_adapters_are_written_as_one_lora_that_computes_the_same(
    method: str, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    model = Net().double()
    inject(model, create_method(method, {"rank": 2, "scale": 0.7, "dropout": 0.25}), ["q_proj", "c_proj"])
    want = _train(model, *tasks)(_X)
    save_peft(model, tmp_path, base_model="some/base", task_type="CAUSAL_LM")
    config, tensors = _read(tmp_path)
    rank = 2 if method == "lora" else 2 * len(tasks)
    assert config == {
        "alpha_pattern": {},
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.25,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": ["c_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    torch.testing.assert_close(
        _by_hand(Net().double(), _X, tensors, dict.fromkeys(_BLOCKS, 1.0)), want, rtol=0, atol=1e-9
    )
    again = Net().double()
    load_peft(again, tmp_path)
    assert torch.equal(again.eval()(_X), want)


def test_a_downloaded_lora_goes_on_training_and_is_written_as_it_is_then(tmp_path: Path) -> None:
    tensors = _tensors({name: 4 + i for i, name in enumerate(_BLOCKS)})
    pattern = {f"^{name}": 4 + i for i, name in enumerate(_BLOCKS)}
    at = _write(tmp_path / "in", tensors, rank_pattern=pattern, new_in_1_0=None, lora_dropout=0.0)
    model = Net().double()
    load_peft(model, at, task="downloaded")
    before = model.eval()(_X)
    start_task(model, "more")
    with pytest.raises(ConfigurationError, match="'more' is being trained"):
        save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.testing.assert_close(model.train()(_X), before, rtol=0, atol=1e-11)
    abandon_task(model)
    assert torch.equal(model.eval()(_X), before)
    want = _train(model, "more")(_X)
    save_peft(model, tmp_path / "out")
    config, found = _read(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["task_type"], config["new_in_1_0"]) == (
        "some/base",
        "CAUSAL_LM",
        None,
    )
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 4, 0.0)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {
        rf"^layers\.{i // 2}\.{n}": 4 + i for i, n in enumerate(["q_proj", "c_proj"] * 2) if i
    }
    torch.testing.assert_close(
        _by_hand(Net().double(), _X, found, dict.fromkeys(_BLOCKS, 1.0)), want, rtol=0, atol=1e-9
    )
    with pytest.raises(ConfigurationError, match=r"lora has overwritten \['downloaded'\] by 'more'"):
        save_peft(model, tmp_path / "old", only="downloaded")


def test_new_tasks_on_top_of_a_downloaded_lora_leave_its_bits_alone(tmp_path: Path) -> None:
    tensors = _tensors(dict.fromkeys(_BLOCKS, 4), torch.float32)
    model = Net().bfloat16()
    load_peft(model, _write(tmp_path / "in", tensors), method="freeze_and_add")
    _train(model, "more")
    for only, rank in (("peft", 4), ("more", 4), (None, 8)):
        save_peft(model, tmp_path / "out", only=only)
        config, found = _read(tmp_path / "out")
        assert {found[_A.format(name)].shape[0] for name in _BLOCKS} == {config["r"]} == {rank}
        assert (config["lora_alpha"] == 24) == (only == "peft")
        assert all(torch.equal(found[key], tensors[key]) for key in tensors) == (only == "peft")


def test_our_own_files_keep_a_downloaded_lora_and_an_ejected_one_is_forgotten(tmp_path: Path) -> None:
    model = Net().double()
    load_peft(model, _write(tmp_path / "in", _tensors(dict.fromkeys(_BLOCKS, 4))))
    want = model.eval()(_X)
    save_adapters(model, tmp_path / "own")
    again = Net().double().eval()
    load_adapters(again, tmp_path / "own")
    assert torch.equal(again(_X), want)
    save_peft(again, tmp_path / "out")
    torch.testing.assert_close(
        _by_hand(Net().double(), _X, _read(tmp_path / "out")[1], dict.fromkeys(_BLOCKS, 1.0)), want, rtol=0, atol=1e-11
    )
    eject(model)
    inject(model, create_method("lora", {"rank": 4}), ["q_proj", "c_proj"])
    assert adapters_of(model).origin is None


def test_what_is_no_sum_of_products_is_not_written(tmp_path: Path) -> None:
    model = Net()
    inject(model, create_method("mora"), ["q_proj"])
    _train(model, "a")
    with pytest.raises(ConfigurationError, match="mora cannot be written as a LoRA: the weights of its atoms depend"):
        save_peft(model, tmp_path)
    with pytest.raises(ConfigurationError, match="mora cannot be merged: the weights of its atoms depend on the input"):
        merge(model)
    eject(model)
    inject(model, create_method("oracle"), ["q_proj"])
    with pytest.raises(ConfigurationError, match="no finished task to write"):
        save_peft(model, tmp_path)
    _train(model, "a", "b")
    with pytest.raises(ConfigurationError, match=r"oracle does not add \['a', 'b'\] up; name one"):
        save_peft(model, tmp_path)
    with pytest.raises(ConfigurationError, match="no finished task 'c'"):
        save_peft(model, tmp_path, only="c")
    assert list(tmp_path.iterdir()) == []
    save_peft(model, tmp_path, only="a")
    use_tasks(model, only="a")
    x = _X.float()
    want = model(x)
    eject(model)
    load_peft(model, tmp_path)
    assert torch.equal(model.eval()(x), want)


def test_names_that_end_like_others_are_written_so_that_only_they_are_meant(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))

    for names, written in (
        (["0"], "0"),
        (["2.0", "2.2"], ["2.0", "2.2"]),
        (["0", "2.0"], ["0"]),
        (["0", "2.2"], r"0|2\.2"),
    ):
        model = make()
        inject(model, create_method("lora", {"rank": 2}), "|".join(names))
        want = _train(model, "a")(torch.ones(1, 4))
        save_peft(model, tmp_path)
        assert _read(tmp_path)[0]["target_modules"] == written
        again = make()
        assert list(load_peft(again, tmp_path).layers) == names
        assert torch.equal(again.eval()(torch.ones(1, 4)), want)


def test_tensors_never_stand_beside_another_ones_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors(dict.fromkeys(_BLOCKS, 4))
    at = _write(tmp_path / "in", tensors)
    model = Net().double()
    load_peft(model, at)
    _train(model, "more")
    replace = Path.replace

    def die_at_the_config(self: Path, target: Path) -> Path:
        if target.name == "adapter_config.json":
            raise OSError("no space")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_at_the_config)
        with pytest.raises(OSError, match="no space"):
            save_peft(model, at)
    with pytest.raises(HoldfastError, match=r"it has no adapter_config\.json"):
        load_peft(Net().double(), at)
    save_peft(model, at)
    load_peft(Net().double(), at)
