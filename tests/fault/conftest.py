"""Whatever else a test of whole runs is about: what keepers commit is what the ranks had, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.strikes import prepare, sightings, struck, torn


@pytest.fixture(autouse=True)
def no_snapshot_is_torn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In runs that this process drives with forked processes. Every worker writes digests of its live state after each
    update; every keeper of the stored bytes, before they count. Tests that flip bits in these bytes are marked."""
    folder = prepare(tmp_path_factory.mktemp("seen") / "by witnesses", [])
    with struck(folder):
        yield
    if request.node.get_closest_marker("flips") is None:
        assert torn(sightings(folder)) == []
