"""Base models and adapters as models of Anthropic's API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

DEFAULT_LIMIT, MAX_LIMIT = 20, 1000
"""Models per page, default and maximum, as in Anthropic's API."""


def shown(base: m.ServedModel, alias: m.Alias | None, record: m.AdapterRecord | None = None) -> dict[str, Any]:
    """Return the object of a base (alias None) or an adapter. record: of the adapter."""
    name, created_ms = (base.name, base.created_ms) if alias is None else (alias.name, alias.created_ms)
    created = datetime.fromtimestamp(created_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    most = max(base.less(record.num_virtual if record is not None else 0).max_model_len - 1, 0)
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": most,
        "max_tokens": most,
    }


def cut(
    bases: Sequence[m.ServedModel],
    aliases: Sequence[m.Alias],
    limit: int,
    after: str | None,
    before: str | None,
    lifecycle: Sequence[str] | None = None,
) -> tuple[Sequence[m.ServedModel], Sequence[m.Alias], bool]:
    """Return the bases and the adapters of a page, and whether there are more. Bases come before adapters.

    aliases: sorted by name. after, before: the model after which the page begins, or before which it ends. lifecycle:
    requested stages, where all models here are `active`; None for all. Raises BadRequest for `after` with `before`, and
    for unknown names.
    """
    if lifecycle and "active" not in lifecycle:
        return [], [], False
    names = [model.name for model in (*bases, *aliases)]
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
    after_bases = max(begin - len(bases), 0), max(end - len(bases), 0)
    return bases[begin:end], aliases[slice(*after_bases)], has_more


def page(models: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a page of model objects."""
    first, last = (models[0]["id"], models[-1]["id"]) if models else (None, None)
    return {"data": models, "has_more": has_more, "first_id": first, "last_id": last}
