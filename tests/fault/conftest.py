"""Whatever else a test of whole runs is about: what keepers commit is what the ranks had, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.strikes import prepare, sightings, torn, witnessed


@pytest.hookimpl(tryfirst=True)  # the group is a part of what xdist sees, from its own hook on
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two processes (``--dist=loadgroup``) one has the runs on Ray, the other all others: two Rays at a time are
    more than two cores start within anybody's patience."""
    for item in items:
        is_on_ray = item.path.name.startswith("test_ray") or "on_ray" in item.name
        item.add_marker(pytest.mark.xdist_group("on Ray" if is_on_ray else "forked"))


@pytest.fixture(autouse=True)
def no_snapshot_is_torn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every worker writes digests of its live state after each update; every keeper of the stored bytes, before they
    count. Tests that flip bits in these bytes are marked. Yields where the witnesses write."""
    folder = prepare(tmp_path_factory.mktemp("seen") / "by witnesses", [])
    with witnessed(folder):
        yield folder
    if request.node.get_closest_marker("flips") is None:
        assert torn(sightings(folder)) == []
