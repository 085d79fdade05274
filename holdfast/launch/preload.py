"""Imported once by the fork server, so that workers forked from it start warm."""

import holdfast.launch.worker  # noqa: F401  (torch, DeepSpeed and the trainer)
