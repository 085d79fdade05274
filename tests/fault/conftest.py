"""Whatever else a test of whole runs is about: what keepers commit is what the ranks had, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.strikes import prepare, sightings, torn, witnessed


@pytest.fixture(autouse=True)
def no_snapshot_is_torn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every worker writes digests of its live state after each update; every keeper of the stored bytes, before they
    count. Tests that flip bits in these bytes are marked. Yields where the witnesses write."""
    folder = prepare(tmp_path_factory.mktemp("seen") / "by witnesses", [])
    with witnessed(folder):
        yield folder
    if request.node.get_closest_marker("flips") is None:
        assert torn(sightings(folder)) == []
