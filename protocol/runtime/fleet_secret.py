"""The secret that a fleet's services share: it authenticates workers to stores and encrypts access tokens in Redis.

A separate key is derived from it for each purpose, so the secret itself is never sent or stored in Redis.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from protocol.runtime.private_files import close_to_others
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, PermissionDenied

MIN_CHARACTERS = 16


class FleetSecret:
    """The shared secret and the keys derived from it."""

    def __init__(self, secret: str) -> None:
        """Derive the keys. Raises BadRequest if the secret is short enough to be guessed."""
        if len(secret) < MIN_CHARACTERS:
            raise BadRequest(f"the fleet's secret has {len(secret)} characters; it needs at least {MIN_CHARACTERS}")
        self._secret = secret.encode()
        self._siv = AESSIV(self._key("tokens"))
        self._token_key = self._key("owners of tokens")
        self.bearer = self._key("store http").hex()[:64]
        """The token that a client of a store sends as `Authorization: Bearer`."""
        self.bodies_key = self._key("bodies")
        """The key from which `sealing.Seal` derives the keys of bodies."""

    @classmethod
    def of(cls, settings: Settings) -> FleetSecret | None:
        """Return the settings' secret, None if they have none; a missing secret file is created.

        Raises BadRequest, OSError.
        """
        if settings.secret:
            return cls(settings.secret)
        return cls(read_or_make(settings.secret_file)) if settings.secret_file else None

    def _key(self, purpose: str) -> bytes:
        return hmac.digest(self._secret, b"lorafleet " + purpose.encode(), "sha512")

    def digest(self, token: str) -> str:
        """Return a hash of a token (32 hex digits) that only this fleet can compute."""
        return hmac.digest(self._token_key, token.encode(), "sha256").hex()[:32]

    def seal(self, text: str, field: str) -> str:
        """Encrypt `text` for this fleet, bound to `field`. Deterministic: equal texts and fields look equal."""
        return base64.b64encode(self._siv.encrypt(text.encode(), [field.encode()])).decode() if text else ""

    def open(self, sealed: str, field: str) -> str:
        """Decrypt what `seal` returned. Raises PermissionDenied if it was sealed with another secret or field."""
        if not sealed:
            return ""
        try:
            return self._siv.decrypt(base64.b64decode(sealed, validate=True), [field.encode()]).decode()
        except (InvalidTag, binascii.Error, ValueError):
            raise PermissionDenied("the token was sealed with another secret: register it again") from None


def owner_of(token: str, secret: FleetSecret | None) -> str:
    """Return the tenant that stands for a token's holder; no other tenant sees the adapters that the token unlocks.

    It is a keyed hash, so that its readers cannot test guesses of the token. Without a fleet secret, nothing of the
    token is kept.
    """
    if not token:
        return ""
    return f"token:{secret.digest(token)}" if secret is not None else "token:"


def read_or_make(path: Path) -> str:
    """Return a file's text, created with a random secret of 256 bits if missing. Racing processes read the same."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
    close_to_others(path)  # a mounted secret that belongs to another user is not changed
    return path.read_text().strip()
