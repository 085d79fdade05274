"""The router of a curriculum: what it is trained on, what it chooses, and when it is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from holdfast import adapters
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.launch.adapt_model import held_out_windows, load_model
from holdfast.launch.adapt_outcomes import features_of
from holdfast.launch.adapt_prompt import Asked, Prompted
from holdfast.launch.adapt_router import keep_router, load_router, weights_of
from holdfast.launch.curriculum import Curriculum
from tests.support.curricula import config_of, make_curriculum
from tests.support.runs import write_corpus


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("texts")
    (root / "numbers").mkdir()
    for number in range(12):
        (root / "numbers" / f"{number}.txt").write_text(" ".join(str(n * n + number) for n in range(400)))
    return {"t0": str(write_corpus(root / "lines")), "t1": str(root / "numbers")}


@pytest.fixture(scope="module", params=["brainstacks", "oracle"])
def school(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]
) -> Curriculum:
    root = tmp_path_factory.mktemp("school")
    curriculum = make_curriculum(root, request.param, texts=texts, steps=40)
    keep_router(curriculum, curriculum.record(), config_of(root, curriculum, router_prompts=160))
    return curriculum


def _losses(school: Curriculum, model: torch.nn.Module, both: torch.Tensor) -> dict[tuple[str, ...], float]:
    """Of what follows the first half of one window, under every choice."""
    is_alone = adapters.adapters_of(model).method.needs_task
    found = {}
    for size in range(2 if is_alone else 3):
        for chosen in combinations(("t0", "t1"), size):
            shown = {"first": 0} if not chosen else {"only": chosen[0]}
            with (
                torch.no_grad(),
                adapters.using_tasks(model, **(shown if is_alone else {"weights": dict.fromkeys(chosen, 1.0)})),
            ):
                logits = model(both[None, :-1])[0].log_softmax(-1)
            half = (len(both) - 1) // 2
            found[chosen] = -float(logits[half - 1 :].gather(1, both[half:, None]).mean())
    return found


def test_its_choices_are_close_to_an_exhaustive_search_and_what_it_tells_of_them_is_true(
    school: Curriculum, texts: dict[str, str]
) -> None:
    record, root = school.record(), school.path.parent.parent
    model = load_model(school, record)
    router = load_router(school, record, model)
    assert router is not None
    choices, nats = Prompted(school)._choices, dict[str, list[float]]()
    for text in texts.values():
        for tokens, targets in held_out_windows(config_of(root, school), text, 40):
            for both in torch.cat([tokens, targets[:, -1:]], 1):
                losses = _losses(school, model, both)
                chosen = weights_of(router, features_of(model, both[None, :8]), choices)[1]
                nats.setdefault("routed", []).append(losses[tuple(d for d in ("t0", "t1") if d in chosen)])
                nats.setdefault("searched", []).append(min(losses.values()))
                nats.setdefault("base", []).append(losses[()])
    mean = {name: sum(found) / len(found) / math.log(2) for name, found in nats.items()}
    told = json.loads((school.path / "router.json").read_text())["about"]["bits"]
    for name, bits in mean.items():
        assert told[name] == pytest.approx(bits, abs=1e-4)
    assert mean["searched"] <= mean["routed"] < mean["searched"] + 0.3 * (mean["base"] - mean["searched"])


def test_a_prompt_is_routed_and_the_regret_is_told(school: Curriculum, texts: dict[str, str]) -> None:
    prompted, text = Prompted(school), "line 3 of file 4 says 25 and"
    lines = prompted.routes(text).splitlines()
    told = next(line for line in lines if line.startswith("router "))
    assert "t0 0." in told and "t1 0." in told
    routed = next(line for line in lines if line.startswith("routed "))
    table = {line.split(maxsplit=1)[1]: float(line.split()[0]) for line in lines[1:-2]}
    bits, regret = float(routed.split(": ")[1].split(",")[0]), float(routed.split(", ")[1].split()[0])
    assert bits - regret == pytest.approx(min(table.values()), abs=2e-3) and regret >= 0
    written = [prompted.write(text, asked, n=8, temperature=0, seed=0) for asked in (Asked(), Asked(mode="routed"))]
    assert written[0] == written[1]


def test_a_router_that_fits_is_left_alone_and_one_that_does_not_is_refused_or_trained_again(
    school: Curriculum, texts: dict[str, str]
) -> None:
    record, root, file = school.record(), school.path.parent.parent, school.path / "router.json"
    config, model = config_of(root, school, router_prompts=8), load_model(school, record)
    before = file.read_bytes()
    keep_router(school, record, config)
    assert file.read_bytes() == before
    other = replace(record, learned=[*record.learned[:1], replace(record.learned[1], digest="f" * 64)])
    with pytest.raises(ConfigurationError, match="was trained on another base or on the tasks"):
        load_router(school, other, model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ConfigurationError, match="was trained on another base"):
        load_router(school, record, model)
    try:
        keep_router(school, other, config)
        assert file.read_bytes() != before
        brick = school.brick(json.loads(file.read_text())["about"]["digest"])
        brick.write_bytes(brick.read_bytes()[:-1] + b"x")
        file.write_bytes(file.read_bytes().replace(b'"prompts": 16', b'"prompts": 17'))
        with pytest.raises(ManifestMismatch, match="does not match its own digest"):
            load_router(school, record, model)
        file.write_bytes(file.read_bytes().replace(b'"prompts": 17', b'"prompts": 16'))
        with pytest.raises(ManifestMismatch, match="have another sha256 than their name"):
            load_router(school, other, load_model(school, record))
    finally:
        file.write_bytes(before)


def test_methods_whose_tasks_act_together_and_single_domains_have_none(tmp_path: Path, texts: dict[str, str]) -> None:
    for method, tasks in (("mora", 2), ("brainstacks", 1)):
        (tmp_path / method).mkdir()
        curriculum = make_curriculum(tmp_path / method, method, tasks, texts)
        assert keep_router(curriculum, curriculum.record(), config_of(tmp_path, curriculum)) == ""
        assert load_router(curriculum, curriculum.record(), torch.nn.Linear(1, 1)) is None
