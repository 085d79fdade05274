"""A decoder with adapters as the trainer builds it: what trains, what is told, what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdfast import adapters
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.trainer.adapting import AdapterTask, adapted_base, find_bricks, problems_of, trainable_elements
from holdfast.trainer.config import AdapterConfig, ModelConfig
from holdfast.trainer.export import export_weights
from holdfast.trainer.frozen import Frozen
from holdfast.trainer.model import Decoder, initialise

MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=48, max_seq_len=16)
ATTENTION = ["wq", "wk", "wv", "wo"]


def _text(seed: int = 0) -> tuple[Tensor, Tensor]:
    both = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1], both[:, 1:]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = Decoder(MODEL)
    initialise(model, 3)
    path = tmp_path / "base" / "model.safetensors"
    export_weights(dict(model.named_parameters()), path, metadata={})
    return path


Make = Callable[..., AdapterTask]


@pytest.fixture
def make(base: Path) -> Make:
    def task(method: str = "lora", name: str = "one", tasks: list[str] | None = None) -> AdapterTask:
        config = AdapterConfig(method=method, options={"rank": 2}, target_modules=ATTENTION, base=str(base))
        config.tasks, config.task = tasks or [], name
        return AdapterTask(config, MODEL, 5, Frozen(find_bricks(config).files), lambda: [(*_text(), 0)])

    return task


def _trained(task: AdapterTask, directory: Path) -> str:
    """Whatever its parameters become."""
    decoder = task.begin(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in decoder.named_parameters()
        if tensor.requires_grad
    }
    task.save(task.finish(weights), directory)
    return str(directory)


@pytest.mark.parametrize("method", adapters.method_names())
def test_a_task_begins_with_no_effect_and_trains_only_what_is_its_own(method: str, make: Make, tmp_path: Path) -> None:
    first = _trained(make(method), tmp_path / "first")
    second = make(method, "two", [first])
    before, decoder = adapted_base(second.config, MODEL), second.begin(torch.device("cpu"))
    if not adapters.adapters_of(before).method.needs_task:
        assert torch.equal(decoder.eval()(*_text()), before.eval()(*_text()))
    trainable = {name for name, tensor in decoder.named_parameters() if tensor.requires_grad}
    assert trainable
    assert all(".current." in name for name in trainable)
    count = sum(decoder.get_parameter(name).numel() for name in trainable)
    counted = trainable_elements(second.config, MODEL)
    assert counted >= count if method == "inflora" else counted == count  # there an upper bound


def test_the_task_that_is_saved_is_the_one_that_was_trained(make: Make, tmp_path: Path) -> None:
    task = make("mora")
    decoder = task.begin(torch.device("cpu"))
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(decoder), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        decoder(*_text(step)).backward()
        optimizer.step()
    weights = {name: tensor.detach() for name, tensor in decoder.named_parameters() if tensor.requires_grad}
    task.save(task.finish(weights), tmp_path / "saved")
    with_it = make("mora", "two", [str(tmp_path / "saved")])
    assert torch.equal(adapted_base(with_it.config, MODEL).eval()(*_text(9)), decoder.eval()(*_text(9)))


def test_a_methods_own_term_has_a_gradient_and_is_not_told(make: Make, tmp_path: Path) -> None:
    first = _trained(make("olora"), tmp_path / "first")
    decoder = make("olora", "two", [first]).begin(torch.device("cpu"))
    parameters = adapters.trainable_parameters(decoder)
    decoder.train()
    told = decoder(*_text())
    told.backward()
    found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    decoder._forward_hooks.clear()
    loss = decoder(*_text())
    assert torch.equal(told, loss)
    term = adapters.penalty(decoder)
    assert term.item() > 0
    expected = torch.autograd.grad(loss + term, parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert torch.equal(decoder(*_text()), loss)


def test_a_task_takes_part_in_evaluation_once_it_was_trained_anywhere(make: Make) -> None:
    task = make("mora")
    decoder = task.begin(torch.device("cpu"))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters(decoder):
            parameter.add_(0.1)
    bare = adapted_base(task.config, MODEL).eval()(*_text())
    decoder.eval()
    task.count(decoder, 0)
    assert torch.equal(decoder(*_text()), bare)
    task.count(decoder, 4)
    assert not torch.equal(decoder(*_text()), bare)


def test_bricks_are_named_by_what_they_hold(make: Make, base: Path, tmp_path: Path) -> None:
    first = Path(_trained(make("mora"), tmp_path / "first"))
    bricks = find_bricks(make("mora", "two", [str(first)]).config)
    (tensors,) = first.glob("adapter-*.safetensors")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (base, tensors)]
    assert [bricks.base, *bricks.tasks] == digests
    assert [file.path for file in bricks.files] == [str(base), str(first / "adapter.json"), str(tensors)]
    assert all(hashlib.sha256(Path(file.path).read_bytes()).hexdigest() == file.digest for file in bricks.files)
    assert bricks.size_bytes == sum(path.stat().st_size for path in (base, first / "adapter.json", tensors))


def test_files_that_do_not_fit_are_refused_by_name(make: Make, base: Path, tmp_path: Path) -> None:
    task, other = make("mora"), Decoder(MODEL)
    first = _trained(task, tmp_path / "first")
    initialise(other, 4)
    export_weights(dict(other.named_parameters()), base, metadata={})
    with pytest.raises(ConfigurationError, match="not the file that the run began with"):
        task.begin(torch.device("cpu"))
    with pytest.raises(ManifestMismatch, match="belong to base weights"):
        make("mora", "two", [first]).begin(torch.device("cpu"))
    base.write_bytes(b"no tensors")
    with pytest.raises(ConfigurationError, match=r"adapter\.base=.* cannot be read"):
        make("mora").begin(torch.device("cpu"))
    export_weights({"embedding.weight": torch.zeros(259, 16)}, base, metadata={})
    with pytest.raises(ConfigurationError, match=r"adapter\.base=.* is of another model"):
        make("mora").begin(torch.device("cpu"))
    with pytest.raises(ConfigurationError, match=r"adapter\.task='one' is among the finished"):
        make("mora", "one", [first])
    base.unlink()
    with pytest.raises(ConfigurationError, match="is no file"):
        make("mora")


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"method": "morra"}, "does not exist; choose one of"),
        ({"options": {"rang": 8}}, "has no option 'rang'"),
        ({"options": {"rank": 0}}, "rank=0 must be at least 1"),
        ({"target_modules": ["wz"]}, "no module is called 'wz'"),
        ({"target_modules": ["^nothing"]}, "matches no linear layer"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(wrong: dict[str, object], word: str) -> None:
    config = AdapterConfig(**{"method": "mora", **wrong})  # type: ignore[arg-type]
    (problem,) = problems_of(config, MODEL)
    assert word in problem


def test_layers_are_chosen_by_name_by_expression_or_all() -> None:
    def count(*names: str) -> int:
        return trainable_elements(AdapterConfig(method="lora", options={"rank": 1}, target_modules=list(names)), MODEL)

    attention = 2 * (64 + 48 + 48 + 64)
    assert count("wq", "wk", "wv", "wo") == attention
    assert count(r"^blocks\.\d+\.attention\.w[qkvo]") == attention
    assert count("all-linear") == attention + 2 * 3 * 80 + 32 + 259
