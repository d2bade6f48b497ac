"""The chaos clients that store things let right answers pass, and find each way to be wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chaos.clients import files
from chaos.clients.asks import GREEDY, Ask, Expected
from chaos.clients.files import UPLOADED, FileClient, UploadClient
from chaos.clients.insistent import Insistent

ASKS = {Ask(model, "x", 5, tuple(GREEDY.items())): Expected(f"as {model}", b"", 1) for model in ("one", "two")}

Answers = Callable[[str, str, dict[str, Any]], dict[str, Any]]


class FakeFleet:
    """Answers as a fleet does that stores what it is sent; `wrong` names what it does otherwise."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.stored: dict[str, bytes] = {}
        self.adapter = ""

    async def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        missing = {"error": f"{method} {path}: 404 no file"}
        file_id = path.split("/")[3] if path.count("/") > 2 else ""
        if (method, path) == ("POST", "/v1/files"):
            self.stored["file-1"] = options["files"]["file"][1]
            return {"error": "POST: 500 broken"} if self.wrong == "refused" else {"id": "file-1"}
        if path.startswith("/v1/files?"):
            return {"data": [{"id": name} for name in self.stored if self.wrong != "unlisted"]}
        if method == "DELETE":
            if self.wrong == "deleted before":
                self.stored.clear()
                return missing
            return {"deleted": self.wrong == "kept" or self.stored.pop(file_id, None) is not None}
        if path.endswith("/content"):
            found = self.stored.get(file_id)
            return missing if found is None else {"raw": found[:-1] if self.wrong == "cut" else found}
        if path.startswith("/v1/adapters/upload"):
            before, self.adapter = self.adapter, "one" if options["content"] == b"one" else "two"
            self.adapter = before if self.wrong == "old" and before else self.adapter
            return {"name": UPLOADED}
        assert options["json"]["model"] == UPLOADED
        return {"choices": [{"text": "else" if self.wrong == "another" else f"as {self.adapter}"}]}


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    fake = FakeFleet()
    monkeypatch.setattr(Insistent, "ask", lambda self, *words, **options: fake.ask(*words, **options))
    monkeypatch.setattr(files, "zipped", lambda folder: folder.name.encode())
    monkeypatch.setattr(files, "SWITCH_S", 0.0)
    return fake


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("", []), ("deleted before", []), ("refused", ["upload: POST: 500"]), ("unlisted", ["is not listed"]),
        ("cut", ["not what was sent"]), ("kept", ["is deleted and can be read"]),
    ],
)  # fmt: skip
async def test_files(fleet: FakeFleet, wrong: str, told: list[str]) -> None:
    fleet.wrong = wrong
    client = FileClient(["http://a"], "")
    found = await client.once(random.Random(1))
    await client.close()
    assert [text in what for text, what in zip(told, found.wrong, strict=True)] == [True] * len(told)
    assert found.ended_s >= found.began_s > 0


@pytest.mark.parametrize(("wrong", "num_wrong"), [("", 0), ("another", 4), ("old", 3)])
async def test_uploads(fleet: FakeFleet, wrong: str, num_wrong: int) -> None:
    fleet.wrong = wrong
    client = UploadClient(["http://a"], "", Path("adapters"), ASKS)
    rng = random.Random(1)
    found = [await client.once(rng) for _ in range(4)]
    await client.close()
    assert sum(len(told.wrong) for told in found) == num_wrong
    assert all("another text" in what for told in found for what in told.wrong)
