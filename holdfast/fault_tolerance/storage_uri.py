"""URIs of storages: what may be in one, and a place below it. Pure; nothing is opened.

::

    /abs/path  file:///abs/path                     a directory
    s3://bucket/prefix?region=...&endpoint_override=host:port&scheme=http
    gs://bucket/prefix?endpoint_override=host:port&scheme=http
    hdfs://host:port/path?user=...&replication=3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from holdfast.errors import ConfigurationError

__all__ = ["StorageUri", "below", "parse_uri"]

_OPTIONS: Mapping[str, frozenset[str]] = {
    "s3": frozenset({"region", "endpoint_override", "scheme"}),
    "gs": frozenset({"endpoint_override", "scheme"}),
    "hdfs": frozenset({"user", "replication"}),
}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account",
    "hdfs": "a Kerberos ticket, and the user as ?user=...",
}


@dataclass(frozen=True, slots=True)
class StorageUri:
    """The parts of a URI, decoded."""

    scheme: str
    """Empty for a directory."""
    host: str
    """Bucket, or name node with its port; empty for a directory."""
    path: str
    """Absolute for a directory and for HDFS; below the bucket otherwise, without a slash at either end."""
    options: Mapping[str, str]


def parse_uri(uri: str) -> StorageUri:
    """Raises: ConfigurationError with what may be there instead."""
    if uri.startswith("/"):
        return StorageUri("", "", uri, {})
    try:
        split = urlsplit(uri)
    except ValueError as error:
        raise ConfigurationError(f"storage {uri!r} is no URI: {error}") from error
    if split.scheme == "file" and split.netloc in ("", "localhost") and split.path.startswith("/"):
        return StorageUri("", "", unquote(split.path), {})
    if split.scheme not in _OPTIONS:
        example = str(Path(split.path).absolute())
        raise ConfigurationError(
            f"storage {uri!r} must be an absolute path or a file:// URI, for example {example!r}, or begin "
            f"with one of {', '.join(f'{scheme}://' for scheme in _OPTIONS)}"
        )
    if "@" in split.netloc:  # the URI is shown, logged and kept with the run
        rest = uri.replace(split.netloc, split.netloc.rpartition("@")[2])
        raise ConfigurationError(f"storage {rest!r} must not hold credentials; give {_CREDENTIALS[split.scheme]}")
    return _remote(uri, split.scheme, split.netloc, unquote(split.path), dict(parse_qsl(split.query)))


def _remote(uri: str, scheme: str, host: str, path: str, options: dict[str, str]) -> StorageUri:
    unknown = sorted(options.keys() - _OPTIONS[scheme])
    if unknown:
        known = ", ".join(sorted(_OPTIONS[scheme]))
        raise ConfigurationError(f"storage {uri!r}: {', '.join(unknown)} is unknown to {scheme}://, which has {known}")
    if options.get("scheme", "https") not in ("http", "https"):
        raise ConfigurationError(f"storage {uri!r}: scheme={options['scheme']!r} must be http or https")
    if not options.get("replication", "1").isdigit():
        raise ConfigurationError(f"storage {uri!r}: replication={options['replication']!r} must be a whole number")
    if not host:
        what = "name node" if scheme == "hdfs" else "bucket"
        raise ConfigurationError(f"storage {uri!r} names no {what}: {scheme}://<{what}>/<path>")
    inside = path.strip("/")
    return StorageUri(scheme, host, f"/{inside}" if scheme == "hdfs" else inside, options)


def below(uri: str, *names: str) -> str:
    """The URI of a place below ``uri``, with the same options."""
    if uri.startswith("/"):
        return "/".join([uri.rstrip("/"), *names])
    split = urlsplit(uri)
    return split._replace(path="/".join([split.path.rstrip("/"), *map(quote, names)])).geturl()
