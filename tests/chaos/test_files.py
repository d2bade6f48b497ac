"""The chaos clients that store data accept correct answers and detect each kind of wrong one."""

from __future__ import annotations

import random
from typing import Any

import pytest

from chaos.clients.asks import GREEDY, Ask, Expected
from chaos.clients.files import UPLOADED, FileClient, UploadClient
from chaos.clients.insistent import Insistent

ASKS = {Ask(model, "x", 5, tuple(GREEDY.items())): Expected(f"as {model}", b"", 1) for model in ("one", "two")}


class FakeFleet(Insistent):
    """Answers as a fleet that stores its requests' data; `wrong` names the deviation."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(["http://nobody"], "")
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


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("", []), ("deleted before", []), ("refused", ["upload: POST: 500"]), ("unlisted", ["is not listed"]),
        ("cut", ["not what was sent"]), ("kept", ["is deleted and can be read"]),
    ],
)  # fmt: skip
async def test_files(wrong: str, told: list[str]) -> None:
    found = await FileClient(FakeFleet(wrong)).once(random.Random(1))
    assert [text in what for text, what in zip(told, found.wrong, strict=True)] == [True] * len(told)
    assert found.ended_s >= found.began_s > 0


@pytest.mark.parametrize(("wrong", "num_wrong"), [("", 0), ("another", 4), ("old", 2)])
async def test_uploads(wrong: str, num_wrong: int) -> None:
    client = UploadClient(FakeFleet(wrong), {"one": b"one", "two": b"two"}, ASKS, switch_s=0.0)
    rng = random.Random(1)
    found = [await client.once(rng) for _ in range(4)]
    assert sum(len(told.wrong) for told in found) == num_wrong
    assert all("another text" in what for told in found for what in told.wrong)
