"""Make one of each thing that clients keep, and write a configuration of schemathesis that names them.

So generated requests meet what is there, and not only ids that nobody has: python .ci/api_check.py URL FILE

Where the fleet asks for keys, OPENAI_API_KEY is one. What it may not make is left out, and requests are made with it:
the configuration names the variable and not the key. FILE.plain is the same without ids.
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
TOKENS = 2  # of each answer
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}


class Forbidden(Exception):
    """The key may not ask this."""


def sent(url: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
    """Return the answer to a GET, or to a POST of a body."""
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
    """Make everything; return ids by the names of the parameters that take them, {} where the key may make nothing."""
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
    """Write the file."""
    url, path = sys.argv[1], Path(sys.argv[2])
    key = [f'headers = {{ Authorization = "Bearer ${{{KEY}}}" }}'] if os.environ.get(KEY) else []
    lines = [f'"path.{name}" = "{id_}"' for name, id_ in made(url).items()]
    path.write_text("\n".join([*key, "[parameters]", *lines, ""]))
    Path(f"{path}.plain").write_text("\n".join([*key, ""]))


if __name__ == "__main__":
    main()
