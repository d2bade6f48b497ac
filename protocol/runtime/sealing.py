"""Encryption of requests' contents in the queue, so that its files and backups contain no readable prompts.

Gateways and workers seal and open with a key derived from the fleet's secret, which the queue never has. Each text is
bound to its place in the queue, so that texts cannot be exchanged. Output tokens, names and times are not sealed. A
seal does not stop anyone who has the fleet's secret, or who runs code in a gateway or worker.
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
"""First byte of a sealed text; neither a msgpack message nor JSON begins with it."""

_NONCE_BYTES = 12


class Seal:
    """Encrypts and decrypts texts (AES-256-GCM)."""

    def __init__(self, key: bytes) -> None:
        """key: at least 32 bytes."""
        self._key = key

    @classmethod
    def of(cls, settings: Settings, secret: FleetSecret | None) -> Seal | None:
        """Return the seal of a service, None unless `seal_bodies` is set. Raises BadRequest without a secret."""
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
        """Decrypt what `seal` returned. Raises ProtocolError if it is unsealed or has another secret or place."""
        if not sealed.startswith(MARK):
            raise ProtocolError(f"{place} is not sealed: start every gateway and worker with --seal-bodies")
        nonce, text = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return self._cipher(place).decrypt(nonce, text, place.encode())
        except (InvalidTag, ValueError):
            raise ProtocolError(f"{place} was sealed with another secret, or modified") from None

    def _cipher(self, place: str) -> AESGCM:
        # A key per place: under a single key, random nonces would be safe for only 2^32 texts.
        return AESGCM(HKDFExpand(SHA256(), 32, place.encode()).derive(self._key))
