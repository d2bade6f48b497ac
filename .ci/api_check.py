"""Create one object of each kind that clients store, and write a schemathesis configuration with their ids.

So generated requests address existing objects, not only unknown ids: python .ci/api_check.py URL FILE. If the fleet
requires API keys, set OPENAI_API_KEY. Objects that the key may not create are left out. Requests carry the key; the
configuration names the variable, not the key. FILE.plain is the same configuration without ids.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

KEY = "OPENAI_API_KEY"
TOKENS = 2  # per answer
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}


class Forbidden(Exception):
    """The key lacks permission for the request."""


def sent(url: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
    """Return the JSON answer to a GET, or to a POST if there is a body."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": kind} | ({"authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, raw, headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise Forbidden from error
        raise


def made(url: str) -> dict[str, str]:
    """Create all objects; return their ids by the names of the path parameters, {} if the key may not create any."""
    with suppress(Forbidden):
        return _made(url)
    return {}


def _made(url: str) -> dict[str, str]:
    model = sent(f"{url}/v1/models")["data"][0]["id"]
    line = json.dumps({**LINE, "body": {"model": model, "prompt": "hi", "max_tokens": TOKENS}}).encode()
    part = b'--b\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    form = part % (b"purpose", b"", b"batch") + part % (b"file", b'; filename="a.jsonl"', line) + b"--b--\r\n"
    file_id = sent(f"{url}/v1/files", form, "multipart/form-data; boundary=b")["id"]
    batch = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    conversation = sent(f"{url}/v1/conversations", {})["id"]
    items = sent(f"{url}/v1/conversations/{conversation}/items", {"items": [{"role": "user", "content": "hi"}]})
    asked = {"model": model, "input": "hi", "max_output_tokens": TOKENS, "background": True}
    job = {"model": model, "prompt": "hi", "max_tokens": TOKENS, "background": True}
    hook = {"name": "n", "url": "https://nobody.invalid/", "event_types": ["batch.expired"]}
    return {
        "file_id": file_id,
        "batch_id": sent(f"{url}/v1/batches", batch)["id"],
        "conversation_id": conversation,
        "item_id": items["data"][0]["id"],
        "response_id": sent(f"{url}/v1/responses", {**asked, "conversation": conversation})["id"],
        "jid": sent(f"{url}/v1/completions", job)["id"],
        "endpoint_id": sent(f"{url}/v1/webhook_endpoints", hook)["id"],
    }


def main() -> None:
    """Write the configuration files."""
    url, path = sys.argv[1], Path(sys.argv[2])
    key = [f'headers = {{ Authorization = "Bearer ${{{KEY}}}" }}'] if os.environ.get(KEY) else []
    lines = [f'"path.{name}" = "{id_}"' for name, id_ in made(url).items()]
    path.write_text("\n".join([*key, "[parameters]", *lines, ""]))
    Path(f"{path}.plain").write_text("\n".join([*key, ""]))


if __name__ == "__main__":
    main()
