"""`lorafleet batch` as people run it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from helpers.scripted_fleet import BASE_NAME, RunningGateway

from lorafleet.__main__ import main


def call(number: int, **body: object) -> str:
    body = {"prompt": "hello", "max_tokens": 4, **body}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body})


async def lorafleet(gateway: RunningGateway, *words: str) -> int:
    return await asyncio.to_thread(main, ["batch", *words, "--url", gateway.url])


async def test_run_writes_answers_and_failures(
    gateway: RunningGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join([call(1), call(2), call(3, temperature=9)]))
    assert await lorafleet(gateway, "run", str(path), "--model", BASE_NAME) == 1
    shown = capsys.readouterr()
    assert "2 of 3 lines answered, 1 failed" in shown.err
    assert shown.out.split() == [str(tmp_path / "calls.output.jsonl"), str(tmp_path / "calls.errors.jsonl")]
    rows = [json.loads(row) for row in (tmp_path / "calls.output.jsonl").read_text().splitlines()]
    assert sorted(row["custom_id"] for row in rows) == ["c1", "c2"]
    assert all(row["response"]["body"]["model"] == BASE_NAME for row in rows)
    assert json.loads((tmp_path / "calls.errors.jsonl").read_text())["custom_id"] == "c3"

    path.write_text(call(1, model=BASE_NAME))
    assert await lorafleet(gateway, "run", str(path), "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out").read_text()
    capsys.readouterr()
    assert await lorafleet(gateway, "list") == 0
    listed = capsys.readouterr().out
    assert listed.count("completed") == 2
    name = listed.splitlines()[1].split()[0]
    assert await lorafleet(gateway, "list", "--json") == 0
    assert name in {batch["id"] for batch in json.loads(capsys.readouterr().out)}
    assert await lorafleet(gateway, "show", name, "--out", str(tmp_path / "again")) == 0
    assert json.loads(capsys.readouterr().out)["id"] == name
    assert (tmp_path / "again").read_text() == (tmp_path / "out").read_text()
    assert await lorafleet(gateway, "cancel", name) == 2
    assert "no longer be cancelled" in capsys.readouterr().err


async def test_a_wrong_file_is_told(
    gateway: RunningGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text(call(1, model=BASE_NAME) + "\n{")
    assert await lorafleet(gateway, "run", str(path)) == 1
    assert "line 2" in capsys.readouterr().err
    for text, told in (("", "is empty"), ("{", "line 1"), ("{}", "--endpoint"), ("[]", "not a JSON object")):
        path.write_text(text)
        assert await lorafleet(gateway, "run", str(path)) == 2
        assert told in capsys.readouterr().err
    assert await lorafleet(gateway, "run", str(tmp_path / "none")) == 2
    assert await lorafleet(gateway, "show", "batch_none") == 2


def test_a_gateway_that_does_not_answer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "cannot reach the gateway at http://127.0.0.1:9" in capsys.readouterr().err
