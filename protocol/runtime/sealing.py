"""Encryption of requests' contents in the queue, so that its files and backups contain no readable prompts.

Gateways and workers seal and open with a key that is derived from the fleet's secret; the queue never has it. Each text
is bound to its place in the queue, so that no two can be exchanged. Not sealed are tokens, the logs of answers, names
and times; nor does a seal stop somebody who has the fleet's secret, or who runs code in a gateway or worker.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, ProtocolError

MARK = b"\xc1"
"""Begins a sealed text: no msgpack message begins so, nor does JSON."""

_NONCE_BYTES = 12


class Seal:
    """Seals and opens texts (AES-256-GCM)."""

    def __init__(self, key: bytes) -> None:
        """`key`: of at least 32 bytes."""
        self._key = key

    @classmethod
    def of(cls, settings: Settings, secret: FleetSecret | None) -> Seal | None:
        """Return the seal of a gateway or worker, None if the settings want none. Raises BadRequest without secret."""
        if not settings.seal_bodies:
            return None
        if secret is None:
            raise BadRequest("seal_bodies: gateways and workers need the same secret_file (or secret)")
        return cls(secret.bodies_key)

    def seal(self, text: bytes, place: str) -> bytes:
        """Encrypt a text for its place in the queue."""
        nonce = os.urandom(_NONCE_BYTES)
        return MARK + nonce + self._cipher(place).encrypt(nonce, text, place.encode())

    def open(self, sealed: bytes, place: str) -> bytes:
        """Undo `seal`. Raises ProtocolError for what is not sealed, or by another secret, or for another place."""
        if not sealed.startswith(MARK):
            raise ProtocolError(f"{place} is not sealed: start every gateway and worker with --seal-bodies")
        nonce, text = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return self._cipher(place).decrypt(nonce, text, place.encode())
        except (InvalidTag, ValueError):
            raise ProtocolError(f"{place} was sealed with another secret, or modified") from None

    def _cipher(self, place: str) -> AESGCM:
        # A key for each place: under one key, random nonces would be safe for 2^32 texts only.
        return AESGCM(HKDFExpand(SHA256(), 32, place.encode()).derive(self._key))
