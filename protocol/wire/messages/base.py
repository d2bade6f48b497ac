"""Base classes of all messages. msgpack by msgspec: unknown fields are ignored, new fields get defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]
Task = Literal["generate", "embed", "classify", "score"]
"""What a request asks for and a base model computes: text, an embedding, a label per token, or the label logits of the
whole text.
"""
MAX_LABELS = 4096
"""Maximum number of labels of a classification head: a text's log holds one number per label."""
TERMINAL = ("completed", "failed", "cancelled")
"""States of a request that has ended. Before its end, a request is `queued` or `assigned`."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of messages that are sent at most once per request."""


class Record(Wire, frozen=True, kw_only=True):
    """Base of messages that outlive the process that wrote them.

    A new field with a default is safe for older releases. Any change that they would misread increments the class's
    `FORM`, and a writer that uses the change stores that number as `form`.
    """

    FORM: ClassVar[int] = 1
    """The newest form that this release can read."""
    form: int = 1


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """Base of messages sent in every step. Fields are positional on the wire, so new ones are only appended."""


encode = msgspec.msgpack.Encoder().encode
"""Encode any message."""
