"""Adapter names that are source references, names that are not, and which sources are allowed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.runtime.adapter_refs import Reference, SourcePolicy, parse_reference
from protocol.runtime.settings import Settings
from protocol.wire.errors import PermissionDenied


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("org/name", Reference("hub", "org", "name")),
        ("hub:org/name", Reference("hub", "org", "name")),
        ("org/name@v1.0", Reference("hub", "org", "name", "v1.0")),
        ("org/name@refs/pr/3", Reference("hub", "org", "name", "refs/pr/3")),
        ("s3://bucket/a/b", Reference("s3", "bucket", "a/b")),
        ("s3://bucket/a/b/", Reference("s3", "bucket", "a/b")),
    ],
)
def test_places(name: str, reference: Reference) -> None:
    assert parse_reference(name) == reference
    assert parse_reference(reference.source) == reference


@pytest.mark.parametrize(
    "name",
    ["name", "a/b/c", "../b", "a/..", "/a/b", "a/b@", "a/b@..", "a/b@x/../y", "a/b@-x", "a b/c", "a/b\n", "a/b\x00",
     "é/b", "s3://bucket", "s3://bucket/", "s3://Bucket/a", "s3://b/a", "s3://bucket/../a", "s3://bucket/a//b",
     "s3://bucket/a b", "s3:/bucket/a", "http://x/y", "file:///etc/passwd", "hub:", "", "a/" + "b" * 97,
     "s3://bucket/" + "a" * 1000],
)  # fmt: skip
def test_no_places(name: str) -> None:
    assert parse_reference(name) is None


@given(st.text(max_size=40))
def test_one_spelling(name: str) -> None:
    reference = parse_reference(name)
    assert reference is None or parse_reference(reference.source) == reference


def test_only_commits_are_fixed() -> None:
    fixed = {name: parse_reference(f"org/name@{name}") for name in ("0" * 40, "0" * 39, "main", "A" * 40)}
    assert [name for name, reference in fixed.items() if reference and reference.is_fixed] == ["0" * 40]


def policy(**settings: Any) -> SourcePolicy:
    return SourcePolicy.of(Settings(**settings))


def allowed(policy: SourcePolicy, name: str, *, on_request: bool, as_fleet: bool = True) -> bool:
    reference = parse_reference(name)
    assert reference is not None
    try:
        policy.check(reference, on_request=on_request, as_fleet=as_fleet)
    except PermissionDenied:
        return False
    return True


@pytest.mark.parametrize(
    ("settings", "name", "registered", "on_request"),
    [
        ({}, "org/a", True, False),
        ({}, "s3://bucket/a", False, False),
        ({"request_sources": "hub"}, "org/a", True, True),
        ({"request_sources": "hub"}, "s3://bucket/a", False, False),
        ({"request_sources": "hub, s3", "s3_buckets": "bucket"}, "s3://bucket/a", True, True),
        ({"request_sources": "s3", "s3_buckets": "other"}, "s3://bucket/a", False, False),
        ({"request_sources": "hub", "hub_orgs": "org, acme"}, "org/a", True, True),
        ({"request_sources": "hub", "hub_orgs": "acme"}, "org/a", False, False),
    ],
)
def test_policy(settings: dict[str, str], name: str, registered: bool, on_request: bool) -> None:
    """By default only registered adapters come from the Hub, and none from S3."""
    assert allowed(policy(**settings), name, on_request=False) == registered
    assert allowed(policy(**settings), name, on_request=True) == on_request


@pytest.mark.parametrize(
    ("places", "name", "lent"),
    [
        ("", "org/a", False),
        ("", "s3://bucket/a", False),
        ("org, s3://bucket/team", "org/a@main", True),
        ("org", "organisation/a", False),
        ("s3://bucket", "s3://bucket/a/b", True),
        ("s3://bucket/team", "s3://bucket/team", True),
        ("s3://bucket/team", "s3://bucket/team/a/b", True),
        ("s3://bucket/team", "s3://bucket/teams/a", False),
        ("s3://bucket/team", "s3://bucket2/team/a", False),
    ],
)
def test_what_the_fleets_credentials_are_lent_for(places: str, name: str, lent: bool) -> None:
    """Without API keys there are no tenants, and every client of the gateway has the fleet's rights."""
    reference = parse_reference(name)
    assert reference is not None
    assert policy(api_keys=True, tenant_places=places).lends(reference) == lent
    assert policy(tenant_places=places).lends(reference)


def test_s3_is_read_with_the_fleets_credentials_or_not_at_all() -> None:
    mine = policy(s3_buckets="bucket")
    assert allowed(mine, "s3://bucket/a", on_request=False)
    assert not allowed(mine, "s3://bucket/a", on_request=False, as_fleet=False)
    assert allowed(mine, "org/a", on_request=False, as_fleet=False)
