"""What counts as the loss of a peer. The messages are those of gloo and torch when ranks were killed or stopped."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from holdfast.errors import CollectiveBroken, RankLost
from holdfast.parallel.comms import broken_collective

_TCP = "/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp"
_GLHF = "Check the logs of the remote worker before reporting an error. GLHF! 🏖️"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            f"[{_TCP}/pair.cc:553] Connection closed by peer [127.0.0.1]:28084. "
            f"This is typically caused by a remote worker crashing. {_GLHF}"
        ),
        RuntimeError(
            f"[{_TCP}/pair.cc:537] Read error [127.0.0.1]:6552: Connection reset by peer. "
            f"This is typically caused by a remote worker hanging or bugs in the application. {_GLHF}"
        ),
        RuntimeError(f"[{_TCP}/unbound_buffer.cc:78] Timed out waiting 12000ms for recv operation to complete"),
        RuntimeError(f"Gloo connectFullMesh failed with [{_TCP}/pair.h:311] Connect timeout [none]"),
        RuntimeError(f"Gloo connectFullMesh failed with [{_TCP}/pair.cc:152] timed out connecting: SO_ERROR: refused"),
        dist.DistStoreError("Wait timeout"),
        dist.DistNetworkError("Broken pipe"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        CollectiveBroken(0, "join", "ranks 1 did not arrive in time"),
    ],
    ids=str,
)
def test_a_lost_peer_is_recognised(error: BaseException) -> None:
    assert broken_collective(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[259, 64]' is invalid for input of size 16640"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ValueError("gloo"),
        RankLost(1, "gloo"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_a_lost_peer(error: BaseException) -> None:
    assert not broken_collective(error)
