"""Models and adapters as JSON: the objects of `/v1/models`, and the more detailed ones of `/v1/adapters`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from protocol.wire import messages as m
from protocol.wire.records import AdapterUse

TIERS = ("resident", "loading", "host", "on_disk")
"""Tiers of an adapter from a worker's view, nearest first; `on_disk` means at the store."""

NO_EFFECT = "no_effect"
"""State of a served adapter whose outputs equal the base model's, shown instead of its tier."""


class AdapterObjects:
    """Makes the objects of `/v1/adapters` from the workers' latest heartbeats."""

    def __init__(self, beats: Iterable[m.WorkerBeat], pins: Mapping[str, str], *, shows_paths: bool = True) -> None:
        """pins: name -> origin of its pin. shows_paths: whether the caller may see paths of this machine."""
        self._shows_paths = shows_paths
        self._pins = pins
        self._tiers: dict[str, dict[str, str]] = {}  # digest -> worker -> tier
        self._beats = sorted(beats, key=lambda beat: beat.name)
        for beat in self._beats:
            for tier, digests in (("host", beat.host), ("loading", beat.loading), ("resident", beat.resident)):
                for digest in digests:
                    self._tiers.setdefault(digest, {})[beat.name] = tier

    def of(self, alias: m.Alias, record: m.AdapterRecord | None, use: AdapterUse | None) -> dict[str, Any]:
        """Return the object of an alias; `state` is the nearest tier on any worker, else the alias's state."""
        workers = self._workers(alias.digest) if alias.state == "on_disk" else {}
        tiers = {worker["tier"] for worker in workers.values()}
        nearest = next((tier for tier in TIERS if tier in tiers), alias.state)
        has_effect = record is None or not record.no_effect
        return {
            "name": alias.name,
            "object": "adapter",
            "tenant": alias.tenant or None,
            "base": alias.base or None,
            "state": nearest if has_effect else NO_EFFECT,
            "digest": alias.digest or None,
            "source": (alias.source if self._shows_paths else told_source(alias.source)) or None,
            "reason": alias.reason or None,
            "warning": None if has_effect else "everything that it adds to the base model is zero",
            "rank": record.rank if record else None,
            "bytes": record.num_bytes if record else None,
            "modules": record.modules if record else None,
            "virtual_tokens": record.num_virtual if record else None,
            "mapped": record.mapped if record else None,
            "converted": converted_object(record),
            "on_request": alias.on_request,
            "pinned": self._pins.get(alias.name),
            "created_ms": alias.created_ms,
            "changed_ms": alias.changed_ms,
            "workers": workers,
            "use": _use_object(use) if use is not None else None,
        }

    def _workers(self, digest: str) -> dict[str, dict[str, Any]]:
        tiers = self._tiers.get(digest, {})
        shown: dict[str, dict[str, Any]] = {}
        for beat in self._beats:
            problem = beat.pinned.get(digest)
            shown[beat.name] = {"tier": tiers.get(beat.name, "on_disk"), "pinned": problem == ""}
            if problem:
                shown[beat.name]["problem"] = problem
        return shown


def _use_object(use: AdapterUse) -> dict[str, Any]:
    return {
        "hits": use.hits,
        "misses": use.misses,
        "last_used_ms": use.last_ms or None,
        "fetches": use.fetches,
        "mean_fetch_ms": round(use.fetch_ms / use.fetches, 1) if use.fetches else None,
        "loads": use.loads,
        "mean_load_ms": round(use.load_ms / use.loads, 1) if use.loads else None,
    }


def converted_object(record: m.AdapterRecord | None, num_layers: int | None = None) -> dict[str, Any] | None:
    """Return how LoRA approximates an adapter, with the errors; None for an adapter that was not converted.

    num_layers: number of layers whose errors are shown, largest first; None: all known.
    """
    converted = record.converted if record is not None else None
    if converted is None:
        return None
    errors = dict(list(converted.errors.items())[:num_layers])
    return {"peft_type": converted.kind, "keep": converted.keep, "errors": errors}


def told_source(source: str) -> str:
    """Return a source for any client: without a path of this machine."""
    return f"local:{PurePosixPath(source).name}" if source.startswith("local:/") else source


def base_object(base: m.ServedModel) -> dict[str, Any]:
    """Return the object of the base model in `/v1/models`."""
    return {
        "id": base.name,
        "object": "model",
        "created": base.created_ms // 1000,
        "owned_by": "lorafleet",
        "root": base.name,
        "parent": None,
        "max_model_len": base.max_model_len,
    }


def adapter_object(
    alias: m.Alias,
    record: m.AdapterRecord | None,
    default: str,
    folder: Path | None = None,
    *,
    shows_paths: bool = False,
) -> dict[str, Any]:
    """Return the object of an adapter in `/v1/models`; `root` is its source, or its path if clients may see it.

    default: name of the default base. folder: the first adapter root, None without one; there may be further roots.
    shows_paths: clients may see paths of this machine.
    """
    root, path = told_source(alias.source), alias.source.removeprefix("local:")
    if shows_paths and path != alias.source and (folder is not None or path.startswith("/")):
        root = str((folder or Path()) / path)
    return {
        "id": alias.name,
        "object": "model",
        "created": alias.created_ms // 1000,
        "owned_by": alias.tenant or "lorafleet",
        "root": root or alias.name,
        "parent": alias.base or default,
        "digest": alias.digest or None,
        "rank": record.rank if record else None,
        "converted": converted_object(record, num_layers=1),
        "state": NO_EFFECT if record and record.no_effect else alias.state,
        "reason": alias.reason or None,
    }
