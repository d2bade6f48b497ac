"""What all messages have in common. msgpack by msgspec: unknown fields are ignored, new fields get defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]
Task = Literal["generate", "embed", "classify", "score"]
"""What a request asks for, and what a base model computes: text, an embedding, a label per token, or the logits of the
labels of the whole text."""
MAX_LABELS = 4096
"""Most labels of a head that scores texts: the log of a text holds a number for each."""
TERMINAL = ("completed", "failed", "cancelled")
"""States of a request that has ended. Before, it is `queued` or `assigned`."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of messages sent once per request or less."""


class Record(Wire, frozen=True, kw_only=True):
    """Base of messages that are kept for longer than the process lives that wrote them.

    A change that older releases would misread, which no new field with a default is, makes `FORM` of its class greater,
    and a sender that uses it writes that as `form`.
    """

    FORM: ClassVar[int] = 1
    """The newest form that this release can read."""
    form: int = 1


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """Base of messages sent per step: fields are positional on the wire, so new ones are added at the end only."""


encode = msgspec.msgpack.Encoder().encode
"""Encode any message."""
