"""Files: what comes back, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    adapters_of,
    append_adapters,
    base_fingerprint,
    collect_inputs,
    create_method,
    finish_task,
    inject,
    load_adapters,
    method_names,
    read_sidecar,
    save_adapters,
    start_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.adapters.tensor_file import decode, encode
from holdfast.errors import ConfigurationError, ManifestMismatch


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3)))


def _trained(name: str, tasks: int = 2, seed: int = 0) -> nn.Sequential:
    model = _model()
    inject(model, create_method(name, {"rank": 2, "scale": 2.0}), ["0"])
    torch.manual_seed(seed + 1)
    for number in range(tasks):
        for step in ("start", "finish"):
            with collect_inputs(model):
                use_tasks(model, first=0)
                model(torch.randn(20, 6))
            use_tasks(model)
            if step == "finish":
                finish_task(model)
            else:
                start_task(model, f"t{number}")
                with torch.no_grad():
                    for parameter in trainable_parameters(model):
                        parameter.add_(torch.randn_like(parameter))
    return model.eval()


def _outputs(model: nn.Module) -> list[Tensor]:
    x = torch.linspace(-1, 1, 24).view(4, 6)
    found = []
    for task in (
        adapters_of(model).tasks[-1:] if not adapters_of(model).method.keeps_tasks else adapters_of(model).tasks
    ):
        use_tasks(model, only=task)
        found.append(model(x).detach())
    use_tasks(model)
    return found


@pytest.mark.parametrize("name", method_names())
def test_a_saved_adapter_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = _trained(name)
    save_adapters(model, tmp_path / "adapter")
    fresh = _model().eval()
    adapters = load_adapters(fresh, tmp_path / "adapter")
    assert adapters.method == adapters_of(model).method and adapters.tasks == ["t0", "t1"]
    assert list(adapters.layers) == ["0", "2.0"] and not any(p.requires_grad for p in fresh.parameters())
    assert all(torch.equal(a, b) for a, b in zip(_outputs(fresh), _outputs(model), strict=True))
    assert {k: t.tolist() for k, t in fresh.state_dict().items()} == {
        k: t.tolist() for k, t in model.state_dict().items()
    }
    # The lineage goes on.
    with collect_inputs(fresh):
        use_tasks(fresh, first=0)
        fresh(torch.randn(20, 6))
    start_task(fresh, "t2")
    with pytest.raises(ConfigurationError, match="'t2' is being trained"):
        save_adapters(fresh, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="'t2' is being trained"):
        load_adapters(fresh, tmp_path / "adapter")


def test_another_process_computes_the_same_bits(tmp_path: Path) -> None:
    model = _trained("mora")
    save_adapters(model, tmp_path)
    torch.save(_model().state_dict(), tmp_path / "base.pt")
    code = (
        "import sys, torch; from pathlib import Path; from torch import nn\n"
        "from holdfast.adapters import load_adapters\n"
        "at = Path(sys.argv[1])\n"
        "model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3)))\n"
        "model.load_state_dict(torch.load(at / 'base.pt'))\n"
        "load_adapters(model, at)\n"
        "print(model.eval()(torch.linspace(-1, 1, 24).view(4, 6)).detach().view(torch.int32).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=50, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr
    want = model(torch.linspace(-1, 1, 24).view(4, 6)).detach().view(torch.int32).tolist()
    assert json.loads(done.stdout) == want


def test_the_file_is_safetensors_and_the_sidecar_says_what_it_is(tmp_path: Path) -> None:
    model = _trained("mora")
    save_adapters(model, tmp_path)
    sidecar = read_sidecar(tmp_path)
    assert (sidecar.method, sidecar.tasks, sidecar.layers) == ("mora", ["t0", "t1"], {"0": [6, 8], "2.0": [8, 3]})
    assert sidecar.options["scale"] == 2.0 and sidecar.base == base_fingerprint(_model())
    tensors = safetensors.torch.load_file(tmp_path / sidecar.tensors)
    assert sorted(tensors) == [f"{n}.{t}.{k}" for n in ("0", "2.0") for t in (0, 1) for k in ("down", "up")]
    for name, rows in adapters_of(model).layers["2.0"].task_rows(1).items():
        assert torch.equal(tensors[f"2.0.1.{name}"], rows)


@given(
    st.lists(
        st.tuples(st.sampled_from(["float64", "float32", "bfloat16", "float16"]), st.integers(0, 5), st.integers(0, 4))
    ),
    st.integers(0, 99),
)
def test_encoded_tensors_are_read_by_us_and_by_safetensors(kinds: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {f"t{i}": torch.randn(a, b).to(getattr(torch, dtype)) for i, (dtype, a, b) in enumerate(kinds)}
    data = encode(tensors, {"format": "pt"})
    for found in (decode(data, "here"), safetensors.torch.load(bytes(data))):
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        assert all(torch.equal(found[name], t) for name, t in tensors.items())


@given(st.data())
def test_bytes_that_are_no_file_are_refused_with_its_name(data: st.DataObject) -> None:
    whole = encode({"a": torch.ones(3, 2)}, {})
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ManifestMismatch, match="somewhere"):
        decode(cut, "somewhere")


def test_a_header_that_lies_about_sizes_is_refused() -> None:
    whole = encode({"a": torch.ones(3, 2)}, {})
    for shape in (b"[2,2]", b"[4,2]"):
        with pytest.raises(ManifestMismatch, match="do not hold"):
            decode(whole.replace(b"[3,2]", shape), "somewhere")
    negative = encode({"abc": torch.ones(3, 2)}, {}).replace(b'"abc"', b'"a"').replace(b"[3,2]", b"[-3,-2]")
    with pytest.raises(ManifestMismatch, match="do not hold"):
        decode(negative, "somewhere")


def test_layers_come_back_by_their_whole_names(tmp_path: Path) -> None:
    model = _model()
    inject(model, create_method("lora"), "0")
    save_adapters(model, tmp_path)
    assert list(load_adapters(_model(), tmp_path).layers) == ["0"]


def test_no_changed_byte_gets_past(tmp_path: Path) -> None:
    save_adapters(_trained("lora"), tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 60)):
            if path.suffix == ".json" and whole[at : at + 1].isspace():
                continue
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            model = _model()
            with pytest.raises((ManifestMismatch, ConfigurationError)):
                load_adapters(model, tmp_path)
            assert not hasattr(model, "holdfast_adapters") and all(p.requires_grad for p in model.parameters())
        path.write_bytes(whole)
    load_adapters(_model(), tmp_path)


def test_another_base_method_or_choice_is_refused(tmp_path: Path) -> None:
    save_adapters(_trained("lora"), tmp_path)
    other = _model()
    with torch.no_grad():
        other[2][1].weight[0] += 1e-6
    with pytest.raises(ManifestMismatch, match="belong to base weights"):
        load_adapters(other, tmp_path)
    with pytest.raises(ManifestMismatch, match="belong to base weights"):
        load_adapters(_model().bfloat16(), tmp_path)
    for name, options, target, message in (
        ("mora", {"rank": 2, "scale": 2.0}, "all-linear", "method lora, this model mora"),
        ("lora", {"rank": 3, "scale": 2.0}, "all-linear", "options .* this model"),
        ("lora", {"rank": 2, "scale": 2.0}, "0", "layers .* this model"),
    ):
        model = _model()
        inject(model, create_method(name, options), target)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ManifestMismatch, match=message):
            load_adapters(model, tmp_path)
        assert model.state_dict().keys() == before.keys()


def test_adapters_of_the_same_kind_are_replaced(tmp_path: Path) -> None:
    saved = _trained("mora", tasks=1)
    save_adapters(saved, tmp_path)
    model = _trained("mora", tasks=3, seed=9)
    load_adapters(model, tmp_path)
    assert adapters_of(model).tasks == ["t0"]
    assert torch.equal(_outputs(model)[0], _outputs(saved)[0])


def test_a_directory_has_the_old_adapters_or_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = _trained("lora", seed=1), _trained("lora", seed=2)
    save_adapters(old, tmp_path)
    replace, moved = Path.replace, list[str]()

    def die_at_the_second(self: Path, target: Path) -> Path:
        moved.append(target.name)
        if len(moved) == 2:
            raise OSError("no space")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_at_the_second)
        with pytest.raises(OSError, match="no space"):
            save_adapters(new, tmp_path)
    assert moved[1] == "adapter.json" and not list(tmp_path.glob("*.tmp-*"))
    fresh = _model().eval()
    load_adapters(fresh, tmp_path)
    assert torch.equal(_outputs(fresh)[0], _outputs(old)[0])
    save_adapters(new, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no adapter.json"):
        load_adapters(_model(), tmp_path)
    save_adapters(_trained("lora"), tmp_path)
    (tmp_path / read_sidecar(tmp_path).tensors).unlink()
    with pytest.raises(ManifestMismatch, match="which is not there"):
        load_adapters(_model(), tmp_path)


def test_the_fingerprint_is_that_of_the_bare_model() -> None:
    model = _model()
    bare = base_fingerprint(model)
    inject(model, create_method("mora"))
    assert base_fingerprint(model) == bare
    model[0].base.weight.data[0, 0] += 1
    assert base_fingerprint(model) != bare


@pytest.mark.parametrize("name", method_names())
def test_tasks_that_are_saved_one_by_one_act_together_as_before(name: str, tmp_path: Path) -> None:
    model = _trained(name, tasks=3)
    for task in adapters_of(model).tasks[:1] if not adapters_of(model).method.keeps_tasks else adapters_of(model).tasks:
        save_adapters(model, tmp_path / task, only=task)
    if not adapters_of(model).method.keeps_tasks:  # what is left of the first tasks is in the last
        save_adapters(model, tmp_path / "t2", only="t2")
    fresh = _model()
    inject(fresh, create_method(name, {"rank": 2, "scale": 2.0}), ["0"])
    directories = sorted(tmp_path.iterdir())
    append_adapters(fresh.eval(), directories[:1])
    append_adapters(fresh, directories[1:])
    for mine, theirs in zip(_outputs(fresh), _outputs(model), strict=True):
        assert torch.equal(mine, theirs)


def test_a_task_is_not_appended_twice_nor_to_another_base(tmp_path: Path) -> None:
    model = _trained("mora", tasks=1)
    save_adapters(model, tmp_path)
    with pytest.raises(ConfigurationError, match="holds t0, and the model has t0"):
        append_adapters(model, [tmp_path])
    other = _model(seed=1)
    inject(other, create_method("mora", {"rank": 2, "scale": 2.0}), ["0"])
    with pytest.raises(ManifestMismatch, match="belong to base weights"):
        append_adapters(other, [tmp_path])
    assert adapters_of(other).tasks == []
