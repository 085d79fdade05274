"""What a storage's URI may say, what it must not, and the place below it."""

from __future__ import annotations

import pytest

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.storage_uri import StorageUri, below, parse_uri


@pytest.mark.parametrize(
    ("uri", "want"),
    [
        ("/a b/c", StorageUri("", "", "/a b/c", {})),
        ("file:///a%20b/c", StorageUri("", "", "/a b/c", {})),
        ("s3://bucket", StorageUri("s3", "bucket", "", {})),
        ("s3://bucket/a/b/?region=eu-west-1", StorageUri("s3", "bucket", "a/b", {"region": "eu-west-1"})),
        (
            "s3://b/p?endpoint_override=minio:9000&scheme=http",
            StorageUri("s3", "b", "p", {"endpoint_override": "minio:9000", "scheme": "http"}),
        ),
        ("gs://bucket/p", StorageUri("gs", "bucket", "p", {})),
        (
            "hdfs://name:8020/p?user=me&replication=2",
            StorageUri("hdfs", "name:8020", "/p", {"user": "me", "replication": "2"}),
        ),
    ],
)
def test_a_uri_is_taken_apart(uri: str, want: StorageUri) -> None:
    assert parse_uri(uri) == want


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/p", "or begin with one of s3://, gs://, hdfs://"),
        ("relative/path", "must be an absolute path"),
        ("s3:///p", "names no bucket: s3://<bucket>/<path>"),
        ("hdfs:///p", "names no name node"),
        ("s3://b/p?regoin=x", "regoin is unknown to s3://, which has endpoint_override, region, scheme"),
        ("s3://b/p?scheme=ftp", "scheme='ftp' must be http or https"),
        ("hdfs://n/p?replication=two", "replication='two' must be a whole number"),
        ("s3://[b/p", "is no URI"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_way_out(uri: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_uri(uri)
    assert said in str(refused.value)


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match=r"'s3://b/p' must not hold credentials; give AWS_ACCESS_KEY_ID") as no:
        parse_uri("s3://AKIA:secret@b/p")
    assert "secret@" not in str(no.value) and "AKIA" not in str(no.value)


@pytest.mark.parametrize(
    ("uri", "want"),
    [
        ("/a/", "/a/p/r 1"),
        ("/a?b", "/a?b/p/r 1"),
        ("file:///a", "file:///a/p/r%201"),
        ("s3://b", "s3://b/p/r%201"),
        ("s3://b/x/?region=r&scheme=http", "s3://b/x/p/r%201?region=r&scheme=http"),
    ],
)
def test_a_place_below_keeps_the_options(uri: str, want: str) -> None:
    assert below(uri, "p", "r 1") == want
    assert parse_uri(want).path.endswith("p/r 1")
