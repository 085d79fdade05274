"""What ``holdfast doctor`` asks of Ray: its token, the cluster, and every node on which the run would live."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast import knobs
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.banner import ray_job_facts
from holdfast.launch.finding import BAD, OK, WARN, Finding

if TYPE_CHECKING:  # importing ray takes a second
    from holdfast.launch.ray_fleet import RayFleet

__all__ = ["cluster_checks"]

_SKEW_S = 2.0


def cluster_checks(config: RunConfig) -> Iterator[Finding]:
    """Nothing about Ray where the run does without; joins the cluster that the run would join, and starts none."""
    if config.launch.kind is LaunchKind.PROCESS:
        return
    address = config.launch.address or knobs.ray_address() or ""
    yield _token(address)
    for fact in ray_job_facts(knobs.ray_job(), knobs.ray_stop_wait_s()).values():
        yield Finding(WARN if "WARNING" in fact else OK, "Ray job", fact.replace("\n", "; "))
    if not address:
        yield Finding(
            OK, "Ray", "no cluster is named, so the run starts its own; launch.address or RAY_ADDRESS names one"
        )
        return
    yield from _cluster(config, address)


def _token(address: str) -> Finding:
    mode, has_token = knobs.ray_auth_mode(), knobs.has_ray_token()
    if mode == "token":
        if has_token:
            return Finding(OK, "Ray token", "RAY_AUTH_MODE=token, and there is one")
        return Finding(
            BAD,
            "Ray token",
            "RAY_AUTH_MODE=token, and there is none; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or make "
            "one with `ray get-auth-token --generate` and give it to every node",
        )
    if not address:
        return Finding(OK, "Ray token", "not needed for a private Ray")
    if has_token and not mode:
        return Finding(
            WARN,
            "Ray token",
            "there is one, so a head started here asks for it, and `ray start --address` and "
            "submitters do not offer it by themselves; set RAY_AUTH_MODE=token on all of them",
        )
    return Finding(
        WARN, "Ray token", "off: whoever reaches the cluster can run code there; set RAY_AUTH_MODE=token on all nodes"
    )


def _cluster(config: RunConfig, address: str) -> Iterator[Finding]:
    from holdfast.launch.ray_fleet import RayFleet

    try:
        fleet = RayFleet(config.launch, f"doctor-{uuid.uuid4().hex[:8]}")
    except ConfigurationError as error:
        yield from (Finding(BAD, "Ray", problem) for problem in error.problems)
        return
    try:
        hosts = fleet.hosts(config.launch.nodes)
        yield Finding(OK, "Ray", f"{address} answers; {config.launch.nodes} nodes on {len(set(hosts))} of Ray's")
        with _marker(config) as (marker, word):
            yield from _nodes(fleet, marker, word)
    finally:
        fleet.close()


def _nodes(fleet: RayFleet, marker: Path, word: str) -> Iterator[Finding]:
    reports = fleet.survey(marker)
    for report in reports:
        problems = report.problems(marker, word)
        yield from (Finding(BAD, "Ray node", problem) for problem in problems)
        if abs(report.ahead_s) > _SKEW_S:
            which = "ahead" if report.ahead_s > 0 else "behind"
            yield Finding(
                WARN,
                "clock",
                f"{report.node} is {abs(report.ahead_s):.0f} s {which}; its logs mislead: run chrony or ntpd",
            )
        if not problems:
            yield Finding(OK, "Ray node", f"{report.node} runs Holdfast {report.version} and sees the root")
    if not reports:
        yield Finding(BAD, "Ray node", "no node answers; look at `ray status` on the head")


@contextmanager
def _marker(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """A file as deep below the root as a run's own."""
    word = uuid.uuid4().hex
    marker = Path(config.root) / f".doctor-{word[:8]}" / "run" / "rendezvous" / "marker"
    try:
        marker.parent.mkdir(parents=True)
        marker.write_text(word)
        yield marker, word
    finally:
        for path in [marker, *list(marker.parents)[:3]]:
            path.unlink(missing_ok=True) if path == marker else path.rmdir()
