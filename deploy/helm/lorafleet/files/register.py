"""Register the adapters of a JSON list with a gateway, and wait for each; the exit code is 1 if one was refused.

Usage: register.py LIST.json URL. The API key, if there is one, is in /key/key.
"""

import json
import pathlib
import sys
import time
import urllib.error
import urllib.request

PATIENCE_S = 900
"""Maximum seconds until a fleet answers: workers may be downloading their model."""


def register(url: str, adapter: dict[str, object], headers: dict[str, str]) -> tuple[int, str]:
    """Return the status and text of a gateway's answer to one registration; status 0 without an answer."""
    body = json.dumps({"replace": True, **adapter}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/adapters", body, headers), timeout=600) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def main(file: str, url: str, pause_s: float = 5.0) -> int:
    """Register the adapters one after another; retry while the fleet is not ready or overloaded."""
    key = pathlib.Path("/key/key")
    headers = {"Content-Type": "application/json"}
    if key.exists():
        headers["Authorization"] = f"Bearer {key.read_text().strip()}"
    deadline = time.monotonic() + PATIENCE_S
    refused = 0
    for adapter in json.loads(pathlib.Path(file).read_text()):
        status, text = register(url, adapter, headers)
        while status in (0, 429, 502, 503) and time.monotonic() < deadline:
            time.sleep(pause_s)
            status, text = register(url, adapter, headers)
        print(adapter.get("name"), status, text if status not in (200, 201, 202) else "", flush=True)
        refused += status not in (200, 201, 202)
    return min(refused, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
