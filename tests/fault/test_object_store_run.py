"""A whole run whose checkpoints go to an object store, and its continuation where nothing else of it is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import open_storage
from holdfast.launch.run import train
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus
from tests.support.s3 import S3Server, s3_server

pytestmark = pytest.mark.timeout(180)

_STEPS = 8


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    forkserver.ensure_running()  # of an earlier run of this process, which had no credentials
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with s3_server(tmp_path / "s3.log") as running:
        running.make_bucket("bucket")
        yield running


def _config(root: Path, corpus: Path, storage: str, *, steps: int = _STEPS) -> RunConfig:
    config = tiny_config(root, corpus, steps=steps, nodes=2, spares=0)
    config.resume, config.run_id = "auto", "run1"
    # One keeper, which writes one rank after the other: moto was seen to give two uploads at once each other's bytes.
    config.launch.nodes, config.launch.workers_per_node = 1, 2
    config.snapshot.persist_every_steps, config.snapshot.storage = 2, storage
    return config


def test_a_run_continues_on_another_machine_from_its_bucket_with_the_same_bits(
    tmp_path: Path, server: S3Server, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, uri = write_corpus(tmp_path / "corpus"), server.uri("bucket")
    first = train(_config(tmp_path / "here", corpus, uri, steps=_STEPS // 2))
    assert (first.exit_code, first.step) == (0, _STEPS // 2)
    assert list((first.run_dir / "checkpoints").iterdir()) == []
    place = server.uri("bucket", "runs/test/run1")
    assert place in capfd.readouterr().out
    written, refused = checkpoint.list_checkpoints(open_storage(place))
    assert (written[0].step, list(refused)) == (_STEPS // 2, [])

    second = train(_config(tmp_path / "there", corpus, uri))
    assert (second.exit_code, second.step) == (0, _STEPS)
    (started,) = events_of(second.run_dir, "run_started")
    assert started["resume"] == f"continuing run1 from {place}; its directory is new here"

    for steps in (_STEPS // 2, _STEPS):  # the learning rate knows the goal
        whole = train(_config(tmp_path / "reference", corpus, "", steps=steps))
    want = outcome_of(whole.run_dir)
    storage = open_storage(place)
    for name, content in want.state.items():
        assert storage.read(f"{checkpoint.directory(_STEPS)}/{name}") == content, name
    shutil.copytree(whole.run_dir / "checkpoints", second.run_dir / "checkpoints", dirs_exist_ok=True)
    found = outcome_of(second.run_dir)
    assert found.weights == want.weights
    assert found.losses == {step: loss for step, loss in want.losses.items() if step > _STEPS // 2}
    assert len(found.losses) == _STEPS // 2


def test_a_bucket_that_does_not_exist_is_refused_before_anything_is_made(tmp_path: Path, server: S3Server) -> None:
    config = _config(tmp_path / "root", write_corpus(tmp_path / "corpus"), server.uri("no-such-bucket"))
    with pytest.raises(ConfigurationError, match=r"snapshot\.storage=.* cannot be used: .*there is no such bucket"):
        train(config)
    assert not (tmp_path / "root").exists()
