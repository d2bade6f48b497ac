"""Batches under faults: a client that uploads many calls, waits for their end, and reads every answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import orjson

from chaos.asks import Ask, Expected
from chaos.client import GIVE_UP_S, PAUSE_S

ENDED = ("completed", "failed", "expired", "cancelled")
POLL_S = 0.5


class BatchClient:
    """Runs one batch at any of the gateways at `urls`, which may die."""

    def __init__(self, urls: Sequence[str], key: str, expected: Mapping[Ask, Expected]) -> None:
        """`key`: the API key that it shows; "" for a fleet that asks for none."""
        self._urls = urls
        self._next = 0
        self.ended: set[tuple[str, str]] = set()  # (type of the event, id of the batch)
        self._expected = expected
        limits = httpx2.Limits(max_keepalive_connections=0)  # a connection from before a kill would only fail
        shown = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(timeout=30, trust_env=False, limits=limits, headers=shown)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def run(self, num_lines: int, rng: random.Random) -> list[str] | None:
        """Run a batch. Returns all that is wrong with it; None when the queue does not know it any more.

        A queue that has lost its last second may have lost a batch that was just made.
        """
        asks = [rng.choice(list(self._expected)) for _ in range(num_lines)]
        lines = [
            {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": ask.body(stream=False)}
            for i, ask in enumerate(asks)
        ]
        text = b"\n".join(map(orjson.dumps, lines))
        form = {"files": {"file": ("in.jsonl", text)}, "data": {"purpose": "batch"}}
        uploaded = await self._insist("POST", "/v1/files", **form)
        wanted = {"input_file_id": uploaded["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = await self._insist("POST", "/v1/batches", json=wanted)
        while batch.get("status") not in ENDED:
            if "error" in batch:
                return None if "no batch" in batch["error"] or "no file" in batch["error"] else [batch["error"]]
            await asyncio.sleep(POLL_S)
            batch = await self._insist("GET", f"/v1/batches/{batch['id']}")
        self.ended.add((f"batch.{batch['status']}", batch["id"]))
        if batch["status"] != "completed" or batch["request_counts"] != {
            "total": num_lines, "completed": num_lines, "failed": 0
        }:  # fmt: skip
            failed = await self._content(batch["error_file_id"])
            return [
                f"{batch['id']} is {batch['status']} with {batch['request_counts']}, {batch['errors']}: {failed[:3]}"
            ]
        return self._wrong(asks, await self._content(batch["output_file_id"]))

    def _wrong(self, asks: Sequence[Ask], rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return what is wrong with the answers: each line has the right one, once."""
        names = [row["custom_id"] for row in rows]
        wrong = [] if sorted(names) == sorted(f"c{i}" for i in range(len(asks))) else [f"{len(names)} answers: {names}"]
        for row in rows:
            ask = asks[int(row["custom_id"][1:])]
            body = row["response"]["body"]
            if body["choices"][0]["text"] != self._expected[ask].text:
                wrong.append(f"{row['custom_id']} {ask}: another text than alone")
        return wrong

    async def _content(self, file_id: str | None) -> list[dict[str, Any]]:
        found = await self._insist("GET", f"/v1/files/{file_id}/content") if file_id else {"raw": b""}
        return [orjson.loads(row) for row in found.get("raw", b"").splitlines()]

    async def _insist(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return an answer, or {"error": …}; what is refused for now, or breaks off, is asked again elsewhere."""
        began_s = time.monotonic()
        while time.monotonic() < began_s + GIVE_UP_S:
            self._next += 1
            with contextlib.suppress(httpx2.TransportError):
                answer = await self._http.request(method, self._urls[self._next % len(self._urls)] + path, **options)
                if answer.status_code == 200:
                    is_content = path.endswith("/content")
                    return {"raw": answer.content} if is_content else answer.json()
                if answer.status_code not in (429, 503):
                    return {"error": f"{method} {path}: {answer.status_code} {answer.text}"}
            await asyncio.sleep(PAUSE_S)
        return {"error": f"{method} {path} was never answered"}
