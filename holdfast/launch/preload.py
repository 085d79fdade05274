"""Imported once by the fork server, so that workers forked from it start warm."""

import contextlib

import holdfast.launch.worker  # noqa: F401  (torch, DeepSpeed and the trainer)

# torch and DeepSpeed import these when the first optimizer is made: two seconds for each worker, or once for all.
with contextlib.suppress(ImportError):  # other versions have other secrets
    import torch._dynamo.debug_utils
    import torch._inductor.compile_fx  # noqa: F401
