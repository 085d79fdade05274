"""Homes of virtual nodes among Ray's nodes: who moves, who stays, and what counts as an answer."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError
from holdfast.launch import ray_nodes
from holdfast.launch.ray_nodes import RayNode, RayNodes, answers


class _Cluster:
    """Ray nodes by name: those that Ray believes alive, and those of them that do not answer."""

    def __init__(self, names: str, gpus: float = 0.0) -> None:
        self.known = {name: RayNode(name, "10.0.0.1", 1, gpus) for name in names}
        self.silent: set[str] = set()
        self.crowd: dict[str, int] = {}
        self.asked: list[str] = []

    def look(self) -> list[RayNode]:
        return list(self.known.values())

    def answers(self, node: RayNode) -> bool:
        self.asked.append(node.name)
        return node.name not in self.silent

    def homes_of(self, count: int, gpus: float = 0.0) -> RayNodes:
        return RayNodes(count, self.look, crowd=lambda name: self.crowd.get(name, 2), gpus=gpus, answers=self.answers)


def _names(nodes: RayNodes) -> str:
    return "".join(home.name for home in nodes.homes)


def test_virtual_nodes_take_turns_on_the_nodes_that_answer() -> None:
    cluster = _Cluster("cab")
    assert _names(cluster.homes_of(5)) == "abcab"
    cluster.silent = {"a"}
    assert _names(cluster.homes_of(3)) == "bcb"


def test_where_nobody_ever_answers_ray_is_believed() -> None:
    cluster = _Cluster("abc")
    cluster.silent = set("abc")
    nodes = cluster.homes_of(3)
    assert nodes.leave_silent(0) == {}
    assert (_names(nodes), nodes.is_stranded(0)) == ("abc", False)
    del cluster.known["a"]
    nodes.leave_silent(0)
    assert _names(nodes) == "bbc"


def test_nobody_moves_while_the_own_home_answers_and_nobody_else_is_asked() -> None:
    cluster = _Cluster("abc")
    nodes = cluster.homes_of(3)
    cluster.silent, cluster.asked[:] = {"b"}, []
    assert nodes.leave_silent(0) == {}
    assert (_names(nodes), cluster.asked) == ("abc", ["a"])


def test_all_tenants_of_all_silent_nodes_move_together_to_the_emptiest_ones() -> None:
    cluster = _Cluster("abcd")
    nodes = cluster.homes_of(6)
    assert _names(nodes) == "abcdab"
    cluster.silent = {"a", "c"}
    moved = nodes.leave_silent(4)
    assert {tenant: home.name for tenant, home in moved.items()} == {0: "a", 2: "c", 4: "a"}
    assert _names(nodes) == "dbbddb"


def test_of_equally_full_nodes_the_one_with_a_spare_is_chosen() -> None:
    cluster = _Cluster("abcd")
    nodes = cluster.homes_of(3)
    cluster.silent, cluster.crowd = {"a", "d"}, {"c": 3}
    nodes.leave_silent(0)
    assert _names(nodes) == "cbc"


def test_a_node_that_ray_has_given_up_is_nobodys_home_although_it_answers() -> None:
    cluster = _Cluster("abc")
    nodes = cluster.homes_of(3)
    cluster.silent = {"a"}
    del cluster.known["b"]
    nodes.leave_silent(0)
    assert _names(nodes) == "ccc"


def test_who_finds_no_room_is_stranded_until_there_is_some() -> None:
    cluster = _Cluster("ab", gpus=2)
    nodes = cluster.homes_of(2, gpus=2)
    cluster.silent = {"a"}
    assert nodes.leave_silent(0) == {}
    assert nodes.is_stranded(0) and not nodes.is_stranded(1)
    cluster.known["c"], cluster.asked[:] = RayNode("c", "10.0.0.1", 1, 2.0), []
    assert nodes.leave_silent(0) == {} and cluster.asked == [], "asking takes seconds, so not every time"
    nodes.look_again()
    assert list(nodes.leave_silent(0)) == [0]
    assert _names(nodes) == "cb" and not nodes.is_stranded(0)


def test_a_stranded_node_whose_home_answers_again_stays() -> None:
    cluster = _Cluster("a")
    nodes = cluster.homes_of(1)
    cluster.silent = {"a"}
    nodes.leave_silent(0)
    cluster.silent.clear()
    nodes.look_again()
    assert nodes.leave_silent(0) == {} and not nodes.is_stranded(0)


def test_too_few_gpus_are_the_users_mistake() -> None:
    with pytest.raises(ConfigurationError, match=r"launch.nodes=3 needs 2 GPUs .* the 2 there are have 2 at most"):
        _Cluster("ab", gpus=2).homes_of(3, gpus=2)


@given(
    count=st.integers(1, 8),
    silences=st.lists(st.tuples(st.integers(0, 7), st.sets(st.sampled_from("abcde"))), max_size=6),
    room=st.integers(1, 8),
)
def test_whatever_falls_silent_nobody_has_to_move_in_vain_or_is_placed_where_nobody_answers(
    count: int, silences: list[tuple[int, set[str]]], room: int
) -> None:
    cluster = _Cluster("abcde", gpus=float(room))
    nodes = cluster.homes_of(min(count, 5 * room), gpus=1.0)
    for tenant, silent in silences:
        tenant %= len(nodes.homes)
        before, cluster.silent = _names(nodes), silent
        nodes.look_again()
        moved = nodes.leave_silent(tenant)
        after = _names(nodes)
        assert all((old != new) == (place in moved) for place, (old, new) in enumerate(zip(before, after, strict=True)))
        assert all(before[place] in silent and after[place] not in silent for place in moved)
        assert nodes.is_stranded(tenant) == (after[tenant] in silent)
        if nodes.is_stranded(tenant):
            free = [name for name in "abcde" if name not in silent and Counter(after)[name] < room]
            assert free == []
        assert max(Counter(after).values()) <= room


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, RayNode]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, RayNode("a", "127.0.0.1", server.getsockname()[1])


def test_who_says_something_answers() -> None:
    with _listening() as (server, node), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(answers, node)
        line, _ = server.accept()
        with line:
            assert line.recv(100).startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4")
            line.sendall(b"\0")
            assert asked.result(10)


def test_a_frozen_process_does_not_answer_although_its_port_takes_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_nodes, "_PATIENCE_S", 0.05)
    with _listening() as (_, node):
        assert not answers(node)


def test_a_port_that_nobody_listens_at_does_not_answer() -> None:
    with _listening() as (_, node):
        pass
    assert not answers(node)


def test_whoever_lives_on_a_node_that_will_be_taken_away_moves_as_soon_as_there_is_room() -> None:
    cluster = _Cluster("abc", gpus=1.0)
    nodes = cluster.homes_of(3, gpus=1.0)
    assert nodes.shun({"b"}) == {}, "everywhere else is taken"
    assert (_names(nodes), nodes.is_stranded(1), nodes.is_stranded(0)) == ("abc", True, False)
    assert nodes.leave_silent(1) == {}, "it still answers, and what lives there is not lost"
    cluster.known["d"] = RayNode("d", "10.0.0.1", 1, 1.0)
    assert {tenant: old.name for tenant, old in nodes.shun({"b"}).items()} == {1: "b"}
    assert (_names(nodes), nodes.is_stranded(1)) == ("adc", False)
    assert nodes.shun({"b"}) == {}


def test_nobody_moves_to_a_node_that_will_be_taken_away() -> None:
    cluster = _Cluster("abc")
    nodes = RayNodes(2, cluster.look, answers=cluster.answers, doomed={"a"})
    assert _names(nodes) == "bc"
    cluster.silent = {"b"}
    nodes.leave_silent(0)
    assert _names(nodes) == "cc"
    assert _names(RayNodes(2, cluster.look, answers=cluster.answers, doomed=set("abc"))) == "ac", "better than none"
