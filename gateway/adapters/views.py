"""Adapters as `/v1/adapters` shows them: where each is in the fleet, and how it is used. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from protocol.wire import messages as m
from protocol.wire.records import AdapterUse

TIERS = ("resident", "loading", "host", "on_disk")
"""Where an adapter may be, seen from a worker, the nearest first; on disk is the store's."""


def tier_of(beat: m.WorkerBeat, digest: str) -> str:
    """Return where an adapter is, seen from a worker."""
    if digest in beat.resident:
        return "resident"
    if digest in beat.loading:
        return "loading"
    return "host" if digest in beat.host else "on_disk"


class FleetView:
    """The workers' latest beats, to be asked about many adapters."""

    def __init__(self, beats: Iterable[m.WorkerBeat], pins: Mapping[str, str]) -> None:
        self._pins = pins
        self._tiers: dict[str, dict[str, str]] = {}  # digest -> worker -> tier
        self._beats = sorted(beats, key=lambda beat: beat.name)
        for beat in self._beats:
            for tier, digests in (("host", beat.host), ("loading", beat.loading), ("resident", beat.resident)):
                for digest in digests:
                    self._tiers.setdefault(digest, {})[beat.name] = tier

    def show(self, alias: m.Alias, record: m.AdapterRecord | None, use: AdapterUse | None) -> dict[str, Any]:
        """Return an adapter as JSON; `state` is the nearest that any worker has it, of what the store has."""
        workers = self._workers(alias.digest) if alias.state == "on_disk" else {}
        tiers = {worker["tier"] for worker in workers.values()}
        nearest = next((tier for tier in TIERS if tier in tiers), alias.state)
        return {
            "name": alias.name,
            "object": "adapter",
            "state": nearest,
            "digest": alias.digest or None,
            "source": alias.source or None,
            "reason": alias.reason or None,
            "rank": record.rank if record else None,
            "bytes": record.num_bytes if record else None,
            "modules": record.modules if record else None,
            "on_request": alias.on_request,
            "pinned": self._pins.get(alias.name),
            "created_ms": alias.created_ms,
            "changed_ms": alias.changed_ms,
            "workers": workers,
            "use": _shown(use or AdapterUse()),
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


def _shown(use: AdapterUse) -> dict[str, Any]:
    return {
        "hits": use.hits,
        "misses": use.misses,
        "last_used_ms": use.last_ms or None,
        "fetches": use.fetches,
        "mean_fetch_ms": round(use.fetch_ms / use.fetches, 1) if use.fetches else None,
        "loads": use.loads,
        "mean_load_ms": round(use.load_ms / use.loads, 1) if use.loads else None,
    }
