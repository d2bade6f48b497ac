"""The fleet's secret: what it seals, who can open that, and how its file is created."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.runtime.fleet_secret import FleetSecret, owner_of
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, PermissionDenied

SECRET = FleetSecret("a secret of the tests")


@given(st.text(max_size=80), st.text(max_size=20))
def test_what_is_sealed_can_be_opened_beside_its_field_only(token: str, field: str) -> None:
    sealed = SECRET.seal(token, field)
    assert SECRET.open(sealed, field) == token
    assert sealed == SECRET.seal(token, field), "an unchanged token must not look changed"
    assert sealed.isascii()
    if token:
        assert len(token) < 4 or token not in sealed
        with pytest.raises(PermissionDenied):
            SECRET.open(sealed, field + "x")
        with pytest.raises(PermissionDenied):
            FleetSecret("another secret, as long").open(sealed, field)


@pytest.mark.parametrize("sealed", ["x", "hf_plain", "é", "QUJD", "=" * 9])
def test_what_was_never_sealed_is_refused(sealed: str) -> None:
    with pytest.raises(PermissionDenied):
        SECRET.open(sealed, "field")


def test_neither_key_gives_the_secret_away() -> None:
    assert len(SECRET.bearer) == 64
    assert SECRET.bearer != FleetSecret("a secret of the test").bearer
    assert "secret" not in SECRET.bearer


def test_the_owner_of_a_token_is_stable_and_tells_nothing() -> None:
    assert owner_of("hf_a", SECRET) == owner_of("hf_a", SECRET) != owner_of("hf_b", SECRET)
    assert "hf_a" not in owner_of("hf_a", SECRET)
    assert owner_of("", SECRET) == ""
    assert owner_of("hf_a", FleetSecret("another secret of tests")) != owner_of("hf_a", SECRET), "it is keyed"
    assert hashlib.sha256(b"hf_a").hexdigest()[:32] not in owner_of("hf_a", SECRET)
    assert owner_of("hf_a", None) == owner_of("hf_b", None), "without a secret, nothing of a token is kept"


def test_a_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    settings = Settings(secret_file=path)
    with ThreadPoolExecutor(8) as threads:
        made = [secret for secret in threads.map(FleetSecret.of, [settings] * 8) if secret is not None]
    assert len(made) == 8
    assert len({secret.bearer for secret in made}) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["secret"]


def test_settings_decide(tmp_path: Path) -> None:
    given_secret = FleetSecret.of(Settings(secret="a secret of the tests", secret_file=tmp_path / "unused"))
    assert given_secret is not None
    assert given_secret.bearer == SECRET.bearer
    assert not (tmp_path / "unused").exists()
    assert FleetSecret.of(Settings()) is None
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(BadRequest, match="5 characters"):
        FleetSecret.of(Settings(secret_file=tmp_path / "short"))
    assert "a secret" not in repr(Settings(secret="a secret of the tests"))
