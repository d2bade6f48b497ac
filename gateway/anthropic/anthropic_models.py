"""The base model and its adapters as models of Anthropic's API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

DEFAULT_LIMIT, MAX_LIMIT = 20, 1000
"""Models of a page, as Anthropic has them."""


def shown(base: m.ServedModel, alias: m.Alias | None) -> dict[str, Any]:
    """Return the object of the base (None) or of an adapter."""
    name, created_ms = (base.name, base.created_ms) if alias is None else (alias.name, alias.created_ms)
    created = datetime.fromtimestamp(created_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": base.max_model_len - 1,
        "max_tokens": base.max_model_len - 1,
    }


def base_of(alias: m.Alias, bases: Sequence[m.ServedModel]) -> m.ServedModel:
    """Return the base of an adapter, the first where none has its name."""
    return next((base for base in bases if base.name == alias.base), bases[0])


def page(
    bases: Sequence[m.ServedModel],
    aliases: Sequence[m.Alias],
    limit: int,
    after: str | None,
    before: str | None,
    lifecycle: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return a page of the bases and the adapters that are served, which are given by name.

    after, before: the model beside which the page begins, or ends. lifecycle: the stages that are wanted, of which
    models here are in `active`; None for all. Raises BadRequest for `after` with `before`, and for unknown names.
    """
    if lifecycle and "active" not in lifecycle:
        return {"data": [], "has_more": False, "first_id": None, "last_id": None}
    models: list[tuple[m.ServedModel, m.Alias | None]] = [(base, None) for base in bases]
    models += [(base_of(alias, bases), alias) for alias in aliases]
    names = [base.name if alias is None else alias.name for base, alias in models]
    if after is not None and before is not None:
        raise BadRequest("after_id and before_id cannot be used together", param="before_id")
    for param, name in (("after_id", after), ("before_id", before)):
        if name is not None and name not in names:
            raise BadRequest(f"{param}: no model is named {brief(name)}", param=param)
    if before is not None:
        end = names.index(before)
        begin = max(end - limit, 0)
        has_more = begin > 0
    else:
        begin = 0 if after is None else names.index(after) + 1
        end = min(begin + limit, len(names))
        has_more = end < len(names)
    data = [shown(base, alias) for base, alias in models[begin:end]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": has_more, "first_id": first, "last_id": last}
