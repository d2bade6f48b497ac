"""Removes secrets from text for people: log lines and command-line errors."""

from __future__ import annotations

import re

HIDDEN = "***"

# Every repetition is bounded, so that a line costs time in proportion to its length.
_RULES = (
    # The password in a URL. It may contain "@" and "/" unquoted, so it ends at the last "@" before a space.
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://[^\s:/@\"'<>]{0,200}):[^\s\"'<>]{0,500}@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{4,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), f"hf_{HIDDEN}"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"), f"sk-{HIDDEN}"),  # the fleet's own keys, and OpenAI's
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}"), rf"\1{HIDDEN}"),
    # Named secrets: NAME=value, "name": "value", signed URLs of S3.
    (
        re.compile(
            r"(?i)(?<![a-z_-])([a-z_-]{0,40}(?:(?:api|access|secret|private)[_-]?key|secret|password|token"
            r"|signature|credential))(\\?[\"']?\s*[=:]\s*\\?[\"']?)"
            r"(?!\*\*\*|bearer\b|basic\b)[^\s\"'\\&,;)}\]]{8,}"
        ),
        rf"\1\2{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """Return `text` with `HIDDEN` in place of passwords in URLs, bearer tokens, API keys and cloud credentials."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
