"""Dead letters as JSON, for `/v1/dead_letters` and `lorafleet dlq --json`."""

from __future__ import annotations

from typing import Any

from protocol.wire import messages as m

SHOWN_BYTES = 400
"""How many bytes of an unreadable message are shown."""


def view(letter_id: str, letter: m.DeadLetter) -> dict[str, Any]:
    """Return the JSON object of a dead letter. Dead letters contain no prompt."""
    sub = letter.submit
    return {
        "id": letter_id,
        "object": "dead_letter",
        "reason": letter.reason,
        "created_ms": letter.ms or None,
        "request": _request(sub, letter) if sub is not None else None,
        "stream": letter.stream or None,
        "raw": repr(letter.raw[:SHOWN_BYTES]) if letter.raw else None,
        "attempts": letter.attempts,
        "deaths": [
            {
                "worker": death.name or None,
                "wid": death.wid,
                "ms": death.ms,
                "phase": death.phase,
                "after_ms": max(0, death.ms - death.assigned_ms),
                "output_tokens": death.num_output_tokens,
            }
            for death in letter.deaths
        ],
    }


def _request(sub: m.RequestHead, letter: m.DeadLetter) -> dict[str, Any]:
    return {
        "id": sub.rid,
        "tenant": sub.tenant,
        "class": sub.cls,
        "digest": sub.digest or None,
        "prompt_tokens": sub.num_prompt_tokens,
        "output_tokens": letter.num_output_tokens,
        "max_tokens": sub.max_new_tokens,
        "submitted_ms": sub.submitted_ms,
    }
