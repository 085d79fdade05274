"""Stacks on disk and read by the page: the same bits, within a budget, or refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import weakref
from itertools import repeat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    base_fingerprint,
    eject,
    finish_task,
    footprint,
    inject,
    load_adapters,
    penalty,
    save_adapters,
    start_task,
    trainable_parameters,
    use_tasks,
    using_tasks,
)
from holdfast.adapters.methods.brainstacks import (
    BoostPlan,
    Brainstacks,
    Curriculum,
    Domain,
    Pager,
    Stack,
    add_stack,
    page_stacks,
    prefix,
    read_manifest,
    remove_stack,
    routed,
    stack_digest,
    ungated,
    validate,
)
from holdfast.adapters.methods.brainstacks import library as library_module
from holdfast.adapters.methods.brainstacks import pager as pager_module
from holdfast.adapters.tensor_file import TensorFile, encode
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.trainer.model import Decoder, initialise
from tests.support.stacks import layered, stacked
from tests.support.tiny_training import TINY

_DOMAINS = ("a", "b", "c", "d")


def _random_stacks(model: nn.Module, domains: tuple[str, ...] = _DOMAINS, seed: int = 0) -> list[Stack]:
    torch.manual_seed(seed)
    stacks = []
    for name in domains:
        after = {stack.task: stack.digest for stack in stacks}
        start_task(model, f"{name}/1", seed=seed)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.normal_(0, 0.3)
        finish_task(model)
        told = {"before": 2.0, "loss": 1.0, "steps": 3, "seconds": 0.5, "ended": "all steps were taken"}
        stacks.append(Stack(name, 1, after, stack_digest(model, f"{name}/1"), **told))  # type: ignore[arg-type]
    return stacks


def _library(directory: Path, domains: tuple[str, ...] = _DOMAINS, seed: int = 0) -> tuple[nn.Sequential, list[Stack]]:
    model = stacked().eval()
    stacks = _random_stacks(model, domains, seed)
    for stack in stacks:
        add_stack(directory, model, stack)
    return model, stacks


def _largest_page(directory: Path) -> int:
    return max(page.size_bytes for record in read_manifest(directory).records for page in record.pages.values())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential, list[Stack]]:
    directory = tmp_path_factory.mktemp("library")
    return directory, *_library(directory)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.dictionaries(st.sampled_from(_DOMAINS), st.sampled_from([1.0, 0.25, 0.0])), min_size=1, max_size=6
    ),
    pages=st.integers(2, 9),
)
def test_paged_stacks_compute_the_bits_of_resident_ones(
    calls: list[dict[str, float]], pages: int, x: Tensor, shared: tuple[Path, nn.Sequential, list[Stack]]
) -> None:
    directory, resident, stacks = shared
    paged = layered().eval()
    budget = pages * _largest_page(directory)
    with page_stacks(paged, directory, budget_bytes=budget) as pager, torch.no_grad():
        for weights in calls:
            acting = routed(stacks, weights)
            with using_tasks(paged, weights=acting), using_tasks(resident, weights=acting):
                assert torch.equal(paged(x), resident(x))
        used = [domain for weights in calls for domain, weight in weights.items() if weight]
        stats = pager.stats
        asked = stats.hits + stats.read_ahead + stats.misses
        assert asked == 2 * len(used) and stats.misses >= 2 * len(set(used)) - stats.read_ahead
        assert stats.peak_bytes <= budget and pager.held_bytes <= budget
        assert (stats.bytes_read > 0) == bool(used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_learns_domains_and_replays_them_from_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    def decoder() -> Decoder:
        model = Decoder(TINY)
        initialise(model, 0)
        return model.to(dtype)

    def of_tokens(name: str, first: int) -> Domain:
        tokens = torch.arange(first, first + 34).view(2, 17)
        batch = tokens[:, :-1], tokens[:, 1:]
        return Domain(name=name, batches=lambda _: repeat(batch), loss=lambda m, b: m(*b), validation=[batch])

    model, domains = decoder(), [of_tokens("low", 0), of_tokens("high", 90)]
    inject(model, Brainstacks(rank=2), exclude=["output"])
    plan = BoostPlan(rounds=2, steps=12, evaluate_every=4, warmup=2, lr=2e-2)
    progress = Curriculum(plan=plan, directions=2, library=tmp_path).learn(model, domains)
    assert [stack.domain for stack in progress.stacks] == ["low", "low", "high", "high"]
    paged = decoder()
    with page_stacks(paged, tmp_path, budget_bytes=3 * _largest_page(tmp_path)):
        for number, one in enumerate(domains):
            stack = progress.stacks[2 * number + 1]
            assert validate(paged, one, prefix(progress.stacks, one.name)) == stack.loss < stack.before


def test_a_page_is_read_once_while_it_stays_and_ahead_when_it_has_to_go(tmp_path: Path, x: Tensor) -> None:
    _library(tmp_path)
    whole = sum(page.size_bytes for record in read_manifest(tmp_path).records for page in record.pages.values())
    model = layered().eval()
    with page_stacks(model, tmp_path, budget_bytes=whole) as pager:
        for _ in range(3):
            model(x)
        stats = pager.stats
        assert (stats.misses, stats.hits, stats.read_ahead, stats.evictions) == (8, 16, 0, 0)
        assert stats.bytes_read == stats.peak_bytes == whole == pager.held_bytes
    eject(model)
    with page_stacks(model, tmp_path, budget_bytes=2 * _largest_page(tmp_path)) as pager:
        model(x)
        assert pager.stats.misses == 8
        model(x)
        # Known from the first pass on is what follows: all is read, and all but the first of it ahead.
        assert (pager.stats.misses, pager.stats.hits, pager.stats.read_ahead) == (9, 0, 7)
        assert pager.stats.evictions >= 14
        assert 2 * whole <= pager.stats.bytes_read <= 2 * whole + _largest_page(tmp_path)
    assert pager.held_bytes == 0
    with pytest.raises(ConfigurationError, match="stack a/1 of a pager that is closed"):
        model(x)


def test_memory_does_not_grow_with_the_number_of_stacks(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_so_far, most = list[weakref.ref[Tensor]](), [0]
    read = TensorFile.read

    def noting(self: TensorFile, names: list[str]) -> dict[str, Tensor]:
        tensors = read(self, names)
        read_so_far.extend(map(weakref.ref, tensors.values()))
        alive = [tensor for ref in read_so_far if (tensor := ref()) is not None]
        most[0] = max(most[0], sum(tensor.nbytes for tensor in alive))
        return tensors

    monkeypatch.setattr(TensorFile, "read", noting)
    bounds = []
    for count in (3, 12):
        at = tmp_path / str(count)
        _library(at, tuple(f"d{n}" for n in range(count)))
        model, most[0] = layered().eval(), 0
        budget = 2 * _largest_page(at)
        with page_stacks(model, at, budget_bytes=budget), torch.no_grad():
            for _ in range(2):
                model(x)
            assert footprint(model).stored == 0
        del model
        bounds.append(budget + _largest_page(at))  # and the page in use
        assert 0 < most[0] <= bounds[-1]
    assert bounds[0] == bounds[1] < 12 * _largest_page(at) / 3


def test_a_new_domain_trains_on_paged_stacks_as_on_resident_ones(tmp_path: Path, x: Tensor) -> None:
    resident, _ = _library(tmp_path)
    paged = layered()
    with page_stacks(paged, tmp_path, budget_bytes=2 * _largest_page(tmp_path)) as pager:
        grads = []
        for model in (resident, paged):
            start_task(model, "new/1")
            with torch.no_grad():
                for parameter in trainable_parameters(model):
                    parameter.add_(0.1)
            torch.manual_seed(1)
            (model.train()(x).square().sum() + penalty(model)).backward()
            grads.append([parameter.grad for parameter in trainable_parameters(model)])
            finish_task(model)
        assert all(a is not None and torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))
        copied = copy.deepcopy(paged).eval()
        assert torch.equal(copied(x), resident.eval()(x)) and torch.equal(paged.eval()(x), copied(x))
        use_tasks(paged, first=2)
        use_tasks(resident, first=2)
        assert torch.equal(paged(x), resident(x))
        save_adapters(paged, tmp_path / "whole")  # gathers what is on disk and what is not
    loaded = load_adapters(layered().eval(), tmp_path / "whole")
    assert loaded.tasks == ["a/1", "b/1", "c/1", "d/1", "new/1"]
    assert pager.manifest.stacks == read_manifest(tmp_path).stacks


def test_stacks_come_go_and_are_replaced_and_the_base_is_always_the_same(tmp_path: Path, x: Tensor) -> None:
    bare = layered().eval()
    fingerprint = base_fingerprint(bare)
    resident, stacks = _library(tmp_path)
    model = layered().eval()

    def look() -> list[str]:
        with page_stacks(model, tmp_path, budget_bytes=10**6) as pager, torch.no_grad():
            assert base_fingerprint(model) == fingerprint
            with using_tasks(model, weights={}):
                assert torch.equal(model(x), bare(x))
            model(x)
            return [stack.task for stack in pager.manifest.stacks]

    assert look() == ["a/1", "b/1", "c/1", "d/1"]
    remove_stack(tmp_path, "b", 1)
    assert look() == ["a/1", "c/1", "d/1"]
    left = read_manifest(tmp_path).stacks
    assert prefix(left, "a") == {"a/1": 1.0}
    with pytest.raises(ConfigurationError, match=r"'d/1' was trained on \['b/1'\]"):
        prefix(left, "d")
    with page_stacks(model, tmp_path, budget_bytes=10**6), using_tasks(resident, weights=ungated(left)):
        assert torch.equal(model(x), resident(x))
    other = stacked().eval()
    (new,) = _random_stacks(other, ("c",), seed=9)
    add_stack(tmp_path, other, new)  # in the place of the old one
    assert look() == ["a/1", "c/1", "d/1"]
    with pytest.raises(ConfigurationError, match=r"'d/1' was trained on \['b/1', 'c/1'\], .* removed or replaced"):
        prefix(read_manifest(tmp_path).stacks, "d")
    assert [s.digest for s in read_manifest(tmp_path).stacks] == [stacks[0].digest, new.digest, stacks[3].digest]
    assert len([at for at in tmp_path.iterdir() if at.is_dir()]) == 3
    with page_stacks(model, tmp_path, budget_bytes=10**6), using_tasks(model, weights={"c/1": 1.0}):
        assert torch.equal(model(x), other(x))
    with pytest.raises(ConfigurationError, match="has no stack 'b/1'"):
        remove_stack(tmp_path, "b", 1)
    eject(model)
    assert torch.equal(model(x), bare(x)) and base_fingerprint(model) == fingerprint


def test_a_stack_is_an_adapter_of_one_task_that_can_be_loaded_alone(tmp_path: Path, x: Tensor) -> None:
    resident, _ = _library(tmp_path)
    record = read_manifest(tmp_path).records[2]
    alone = layered().eval()
    assert load_adapters(alone, tmp_path / record.directory).tasks == ["c/1"]
    with using_tasks(resident, only="c/1"):
        assert torch.equal(alone(x), resident(x))
    with pytest.raises(ConfigurationError, match="no finished task 'z/1'"):
        save_adapters(resident, tmp_path, only="z/1")


def test_no_changed_byte_of_a_stack_gets_past(tmp_path: Path, x: Tensor) -> None:
    _library(tmp_path, ("a",))
    record = read_manifest(tmp_path).records[0]
    files = [tmp_path / "manifest.json", *sorted((tmp_path / record.directory).iterdir())]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            if path.suffix == ".json" and whole[at : at + 1].isspace():
                continue
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            model = layered().eval()
            with pytest.raises(ManifestMismatch), page_stacks(model, tmp_path, budget_bytes=10**6):
                model(x)
        path.write_bytes(whole)
    with page_stacks(model := layered().eval(), tmp_path, budget_bytes=10**6):
        model(x)


def test_damage_after_opening_is_found_at_the_page_even_when_it_was_read_ahead(tmp_path: Path, x: Tensor) -> None:
    _library(tmp_path)
    model = layered().eval()
    with page_stacks(model, tmp_path, budget_bytes=2 * _largest_page(tmp_path)) as pager:
        good = model(x)
        record = read_manifest(tmp_path).records[1]
        (path,) = (tmp_path / record.directory).glob("*.safetensors")
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for _ in range(2):
            with pytest.raises(ManifestMismatch, match=r"layer \d of stack 'b/1' in .* is damaged"):
                model(x)
        path.unlink()
        with pytest.raises(ManifestMismatch, match="lost its tensors"):
            model(x)
        path.write_bytes(whole)
        assert torch.equal(model(x), good)
        assert pager.held_bytes <= 2 * _largest_page(tmp_path)


def test_a_page_that_was_read_ahead_in_vain_and_damaged_costs_nothing(tmp_path: Path, x: Tensor) -> None:
    _, stacks = _library(tmp_path)
    model = layered().eval()
    budget = 2 * _largest_page(tmp_path)
    with page_stacks(model, tmp_path, budget_bytes=budget) as pager:
        record = read_manifest(tmp_path).records[1]
        (path,) = (tmp_path / record.directory).glob("*.safetensors")
        whole = path.read_bytes()
        for _ in range(8):
            path.write_bytes(whole)
            model(x)  # b follows a
            path.write_bytes(whole[:-600] + bytes(600))
            with using_tasks(model, weights=routed(stacks, {"a": 1.0, "c": 1.0})):
                model(x)
        assert pager.stats.peak_bytes <= budget


def test_the_page_that_was_not_used_for_longest_leaves_first(tmp_path: Path) -> None:
    _library(tmp_path)
    manifest = read_manifest(tmp_path)
    layer, page = max(manifest.records[0].pages.items(), key=lambda item: item[1].size_bytes)
    with Pager(tmp_path, manifest, budget_bytes=3 * page.size_bytes) as pager:
        for domain in "abacda":
            pager.page((domain, 1, layer))
        assert (pager.stats.misses, pager.stats.hits, pager.stats.evictions) == (4, 2, 1)


def test_stacks_of_another_library_base_or_kind_are_refused(tmp_path: Path, x: Tensor) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _library(one)
    model, stacks = _library(two, seed=3)
    with pytest.raises(ManifestMismatch, match="is not the stack that was frozen"):
        add_stack(one, model, dataclasses.replace(stacks[0], digest="0" * 64))
    first, second = (read_manifest(at).records[0].directory for at in (one, two))
    shutil.rmtree(one / first)
    shutil.copytree(two / second, one / first)
    with pytest.raises(ManifestMismatch, match=r"another digest than manifest.json says of 'a/1'"):
        page_stacks(layered(), one, budget_bytes=10**6)
    shutil.rmtree(one / first)
    with pytest.raises(ManifestMismatch, match="names 'a/1'"):
        page_stacks(layered(), one, budget_bytes=10**6)
    other = layered()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-6
    with pytest.raises(ManifestMismatch, match="belong to base weights"):
        page_stacks(other, two, budget_bytes=10**6)
    assert not hasattr(other, "holdfast_adapters")
    for different, what in ((stacked(experts=3), "options"), (stacked(rank=3), "options")):
        (stack,) = _random_stacks(different, ("a",))
        with pytest.raises(ManifestMismatch, match=f"is of another {what} than this model"):
            add_stack(two, different, stack)
    with page_stacks(layered().eval(), two, budget_bytes=10**6) as pager:
        assert len(pager.manifest.records) == 4


def test_a_crash_leaves_the_old_stack_or_the_new_one(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = _library(tmp_path, ("a",))
    new = stacked().eval()
    (stack,) = _random_stacks(new, ("a",), seed=9)

    def no_space(path: Path, data: bytes) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(library_module, "write_whole", no_space)
        with pytest.raises(OSError, match="no space"):
            add_stack(tmp_path, new, stack)
    with page_stacks(model := layered().eval(), tmp_path, budget_bytes=10**6):
        assert torch.equal(model(x), old(x))
    add_stack(tmp_path, new, stack)
    with page_stacks(model, tmp_path, budget_bytes=10**6):
        assert torch.equal(model(x), new(x))


def test_budgets_and_places_that_cannot_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no manifest.json"):
        page_stacks(layered(), tmp_path, budget_bytes=10**6)
    _library(tmp_path, ("a",))
    least = 2 * _largest_page(tmp_path)
    with pytest.raises(ConfigurationError, match=f"give at least {least}"):
        page_stacks(layered(), tmp_path, budget_bytes=least - 1)
    about = json.loads((tmp_path / "manifest.json").read_bytes())["about"]
    assert about["records"][0]["stack"]["domain"] == "a" and about["kind"]["method"] == "brainstacks"
    remove_stack(tmp_path, "a", 1)
    with pytest.raises(ConfigurationError, match="has no stacks"):
        page_stacks(layered(), tmp_path, budget_bytes=10**6)


def test_a_part_of_a_file_is_read_as_the_whole_is(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(n, 3, dtype=torch.float64 if n % 2 else torch.float32) for n in range(4)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(tensors, {"format": "pt"}))
    file = TensorFile(path)
    assert sorted(file.names("t")) == sorted(tensors) and file.names("t2") == ["t2"]
    found = file.read(["t3", "t0", "t2"])
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    with pytest.raises(ManifestMismatch, match=r"x.safetensors is no safetensors file"):
        file.read(["t9"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestMismatch, match=r"x.safetensors"):
        TensorFile(path).read(["t2"])  # the last one of the file
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ManifestMismatch, match=r"x.safetensors is no safetensors file"):
        TensorFile(path)


def test_a_pager_leaves_no_thread(tmp_path: Path, x: Tensor) -> None:
    _library(tmp_path, ("a", "b"))
    model = layered().eval()
    pager = page_stacks(model, tmp_path, budget_bytes=2 * _largest_page(tmp_path))
    for _ in range(2):
        model(x)
    thread = next(iter(pager._thread._threads))
    assert isinstance(pager, Pager) and pager_module.PagerStats() != pager.stats
    pager.close()
    assert not thread.is_alive()
