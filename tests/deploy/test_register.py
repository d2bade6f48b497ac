"""The chart's job that registers adapters, tested by running its script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import script
from helpers.stub_http import serving

SCRIPT = "deploy/helm/lorafleet/files/register.py"


class Gateway(BaseHTTPRequestHandler):
    """Refuses `bad`, answers 503 to the first request, and records all requests."""

    asked: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, body))
        status = 422 if body["name"] == "bad" else 503 if len(self.asked) == 1 else 201
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"told")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture
def gateway() -> Iterator[str]:
    Gateway.asked = []
    with serving(Gateway) as url:
        yield url


@pytest.mark.parametrize("names", [["a", "b"], ["a", "bad", "b"]], ids=["all are taken", "one is refused"])
def test_adapters_are_registered_once_the_fleet_answers(
    gateway: str, tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapters.json"
    file.write_text(json.dumps([{"name": name, "source": f"org/{name}"} for name in names]))
    assert script(SCRIPT).main(str(file), gateway, pause_s=0.0) == ("bad" in names)
    assert Gateway.asked[0] == Gateway.asked[1] == ("/v1/adapters", {"replace": True, "name": "a", "source": "org/a"})
    assert [body["name"] for _, body in Gateway.asked[1:]] == names
    assert ("bad 422 told" in capsys.readouterr().out) == ("bad" in names)
