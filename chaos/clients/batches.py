"""Batches under faults: a client uploads many calls, waits until they end, and checks every answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from chaos.clients.asks import Ask, Expected
from chaos.clients.insistent import Insistent
from protocol.wire.lines import lines_of

ENDED = ("completed", "failed", "expired", "cancelled")
POLL_S = 0.5

MAX_LOOKS = 60
"""Maximum number of times that an ended batch is read again because its file cannot be read."""


class BatchClient:
    """Runs one batch at a time at any of the gateways at `urls`, which may die."""

    def __init__(self, urls: Sequence[str], key: str, expected: Mapping[Ask, Expected]) -> None:
        """key: the client's API key; "" for a fleet without keys."""
        self.ended: set[tuple[str, str]] = set()  # (event type, batch id)
        self._expected = expected
        self._http = Insistent(urls, key)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    async def run(self, num_lines: int, rng: random.Random) -> list[str] | None:
        """Run a batch. Return everything that is wrong with it; None if the queue no longer knows it or its file.

        A queue that lost its last second of writes may have lost a new batch or its input file. If the file is lost
        between a gateway's check for it and its write of the batch, the batch fails because of the missing file.
        """
        asks = [rng.choice(list(self._expected)) for _ in range(num_lines)]
        lines = [
            {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": ask.body(stream=False)}
            for i, ask in enumerate(asks)
        ]
        text = b"\n".join(map(orjson.dumps, lines))
        form = {"files": {"file": ("in.jsonl", text)}, "data": {"purpose": "batch"}}
        uploaded = await self._http.ask("POST", "/v1/files", **form)
        wanted = {"input_file_id": uploaded["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = await self._http.ask("POST", "/v1/batches", json=wanted)
        looked: list[str] = []
        while len(looked) < MAX_LOOKS:
            while batch.get("status") not in ENDED:
                if "error" in batch:
                    return None if "no batch" in batch["error"] or "no file" in batch["error"] else [batch["error"]]
                await asyncio.sleep(POLL_S)
                batch = await self._http.ask("GET", f"/v1/batches/{batch['id']}")
            if batch["status"] == "failed" and [one["code"] for one in batch["errors"]["data"]] == ["file_not_found"]:
                self.ended.add(("batch.failed", batch["id"]))
                return None
            is_whole = batch["status"] == "completed" and batch["request_counts"] == {
                "total": num_lines, "completed": num_lines, "failed": 0
            }  # fmt: skip
            found = await self._content(batch["output_file_id" if is_whole else "error_file_id"])
            if isinstance(found, list):
                self.ended.add((f"batch.{batch['status']}", batch["id"]))
                told = f"{batch['id']} is {batch['status']} with {batch['request_counts']}, {batch['errors']}"
                return self._wrong(asks, found) if is_whole else [f"{told}: {found[:3]}"]
            looked.append(found)
            await asyncio.sleep(POLL_S)
            batch = await self._http.ask("GET", f"/v1/batches/{batch['id']}")
        return [f"{batch['id']} is {batch['status']}, and its file cannot be read: {looked[-1]}"]

    def _wrong(self, asks: Sequence[Ask], rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return the errors in the answers: each line must have the expected one, once."""
        names = [row["custom_id"] for row in rows]
        wrong = [] if sorted(names) == sorted(f"c{i}" for i in range(len(asks))) else [f"{len(names)} answers: {names}"]
        for row in rows:
            ask = asks[int(row["custom_id"][1:])]
            body = row["response"]["body"]
            if body["choices"][0]["text"] != self._expected[ask].text:
                wrong.append(f"{row['custom_id']} {ask}: another text than alone")
        return wrong

    async def _content(self, file_id: str | None) -> list[dict[str, Any]] | str:
        """Return the rows of a file, or an error: a queue that lost its last second may have lost the file."""
        found = await self._http.ask("GET", f"/v1/files/{file_id}/content") if file_id else {"raw": b""}
        return (
            str(found["error"]) if "error" in found else [orjson.loads(row) for row in lines_of(found["raw"].decode())]
        )
