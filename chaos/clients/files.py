"""Files and uploaded adapters under faults: what was stored stays available and unchanged until it is deleted."""

from __future__ import annotations

import asyncio
import io
import random
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from chaos.clients.asks import Ask, Expected
from chaos.clients.insistent import Insistent

MAX_FILE_BYTES = 300_000
UPLOADED = "uploaded"
"""The name under which all adapters are uploaded, one after the other."""

SWITCH_S = 30.0
"""Maximum seconds until every gateway serves the newest upload of a name; until then the previous one is allowed."""

LOOK_S = 0.2


@dataclass(slots=True)
class Round:
    """The result of one round."""

    began_s: float  # time.monotonic
    ended_s: float = 0.0
    num_calls: int = 0
    wrong: list[str] = field(default_factory=list)


class FileClient:
    """Stores a file, lists it, reads it, and deletes it, at any gateway, which may die."""

    def __init__(self, http: Insistent) -> None:
        self._http = http

    async def once(self, rng: random.Random) -> Round:
        """Run one round. An upload whose answer was lost is repeated, and may be stored twice."""
        told = Round(time.monotonic())
        sent = rng.randbytes(rng.randrange(1, MAX_FILE_BYTES))
        form = {"files": {"file": ("kept.bin", sent)}, "data": {"purpose": "batch"}}
        stored = await self._http.ask("POST", "/v1/files", **form)
        if "error" in stored:
            told.wrong.append(f"upload: {stored['error']}")
        else:
            await self._meet(told, stored["id"], sent)
        told.ended_s = time.monotonic()
        return told

    async def _meet(self, told: Round, file_id: str, sent: bytes) -> None:
        path = f"/v1/files/{file_id}"
        listed = await self._http.ask("GET", "/v1/files?purpose=batch&limit=100")
        if file_id not in [file["id"] for file in listed.get("data", ())]:
            told.wrong.append(f"{file_id} is not listed: {listed.get('error', '')}")
        found = await self._http.ask("GET", f"{path}/content")
        if found.get("raw") != sent:
            told.wrong.append(f"{file_id} is not what was sent: {found.get('error', '')}")
        deleted = await self._http.ask("DELETE", path)
        if not deleted.get("deleted") and ": 404 " not in deleted["error"]:  # 404: an earlier attempt has deleted it
            told.wrong.append(f"{file_id} cannot be deleted: {deleted['error']}")
        gone = await self._http.ask("GET", f"{path}/content")
        if ": 404 " not in gone.get("error", ""):
            told.wrong.append(f"{file_id} is deleted and can be read")
        told.num_calls += 5


class UploadClient:
    """Uploads adapters one after the other under the same name; the model must answer as the adapter of that upload."""

    def __init__(
        self, http: Insistent, zips: Mapping[str, bytes], expected: Mapping[Ask, Expected], switch_s: float = SWITCH_S
    ) -> None:  # fmt: skip
        """http: sends an operator's key. zips: adapter -> its zipped files. expected: the right answers by adapter."""
        self._http = http
        self._zips = zips
        self._expected = expected
        self._switch_s = switch_s
        self._before = ""  # the previous upload

    async def once(self, rng: random.Random) -> Round:
        """Upload an adapter in place of the previous one, and ask it until it answers."""
        told = Round(time.monotonic())
        name = rng.choice([name for name in sorted(self._zips) if name != self._before])
        path = f"/v1/adapters/upload?name={UPLOADED}&replace=true&wait_s=20"
        sent = {"content": self._zips[name], "headers": {"content-type": "application/zip"}}
        stored = await self._http.ask("POST", path, **sent)
        if "error" in stored:
            told.wrong.append(f"upload of {name}: {stored['error']}")
        else:
            told.num_calls += 1 + await self._ask(told, name, rng)
        self._before = name
        told.ended_s = time.monotonic()
        return told

    async def _ask(self, told: Round, name: str, rng: random.Random) -> int:
        """Ask `UPLOADED` as adapter `name` was asked. Return the number of answered calls."""
        ask = rng.choice([ask for ask in self._expected if ask.model == name])
        before = self._expected.get(replace(ask, model=self._before))
        body, right = replace(ask, model=UPLOADED).body(stream=False), self._expected[ask].text
        began_s, num_calls = time.monotonic(), 0
        while True:
            answer = await self._http.ask("POST", "/v1/completions", json=body)
            if "error" in answer:
                told.wrong.append(f"{name}, uploaded: {answer['error']}")
                return num_calls
            num_calls += 1
            text = answer["choices"][0]["text"]
            if text == right:
                return num_calls
            is_of_before = before is not None and text == before.text
            if not is_of_before or time.monotonic() > began_s + self._switch_s:
                told.wrong.append(f"{ask}, uploaded, has another text than under its own name")
                return num_calls
            await asyncio.sleep(LOOK_S)


def zipped(folder: Path) -> bytes:
    """Return a zip of the files in a folder."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return packed.getvalue()
