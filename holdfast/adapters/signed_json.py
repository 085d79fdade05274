"""JSON files that hold their own sha256, so that a changed option is noticed like a changed tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import ManifestMismatch

__all__ = ["read_signed", "signed"]


def signed(about: Mapping[str, Any]) -> bytes:
    """The file's bytes."""
    return json.dumps({"about": about, "digest": _digest(about)}, indent=2, ensure_ascii=False).encode()


def read_signed(path: Path, *, format_version: int) -> dict[str, Any]:
    """What was signed. Raises: FileNotFoundError; ManifestMismatch for damage and for another ``format_version``."""
    try:
        content = json.loads(path.read_bytes())
        about, digest, version = content["about"], content["digest"], content["about"]["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestMismatch(f"{path} does not describe adapters: {error}") from error
    if _digest(about) != digest:
        raise ManifestMismatch(f"{path} does not match its own digest: it is damaged, or was edited")
    if version != format_version:
        raise ManifestMismatch(f"{path} has format_version={version}, this version of Holdfast reads {format_version}")
    return dict(about)


def _digest(about: object) -> str:
    canonical = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()
