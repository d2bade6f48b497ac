"""The secret that a fleet's services share: it opens the stores to workers and seals the tokens that lie in Redis.

Both keys are derived from it, so that neither what crosses the network nor what lies in Redis gives it away.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, PermissionDenied

MIN_CHARACTERS = 16


class FleetSecret:
    """One secret and what is derived from it."""

    def __init__(self, secret: str) -> None:
        """Raise BadRequest for one that could be guessed."""
        if len(secret) < MIN_CHARACTERS:
            raise BadRequest(f"the fleet's secret has {len(secret)} characters; it needs at least {MIN_CHARACTERS}")
        self._secret = secret.encode()
        self._siv = AESSIV(self._key("tokens"))
        self.bearer = self._key("store http").hex()[:64]
        """What a client of a store shows as `Authorization: Bearer`."""

    @classmethod
    def of(cls, settings: Settings) -> FleetSecret | None:
        """Return the secret of the settings, making their file if it is not there yet; None if they name none.

        Raises BadRequest, OSError.
        """
        if settings.secret:
            return cls(settings.secret)
        return cls(_read_or_make(settings.secret_file)) if settings.secret_file else None

    def _key(self, purpose: str) -> bytes:
        return hmac.digest(self._secret, b"lorafleet " + purpose.encode(), "sha512")

    def seal(self, text: str, field: str) -> str:
        """Return `text` so that only this fleet can read it, and only beside `field`. Equal texts look equal there."""
        return base64.b64encode(self._siv.encrypt(text.encode(), [field.encode()])).decode() if text else ""

    def open(self, sealed: str, field: str) -> str:
        """Undo `seal`. Raises PermissionDenied when another secret, or another field, sealed it."""
        if not sealed:
            return ""
        try:
            return self._siv.decrypt(base64.b64decode(sealed, validate=True), [field.encode()]).decode()
        except (InvalidTag, binascii.Error, ValueError):
            raise PermissionDenied("the token was sealed with another secret: register it again") from None


def owner_of(token: str) -> str:
    """Return the tenant that stands for whoever holds a token: what it opens is seen by nobody else."""
    return f"token:{hashlib.sha256(token.encode()).hexdigest()[:32]}" if token else ""


def _read_or_make(path: Path) -> str:
    """Return a file's text. Of several processes that find none, one makes it and all read the same."""
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
    return path.read_text().strip()
