"""Make one of each thing that clients keep, and write a configuration of schemathesis that names them.

So generated requests meet what is there, and not only ids that nobody has: python .ci/api_check.py URL FILE
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

TOKENS = 2  # of each answer
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}


def sent(url: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
    """Return the answer to a GET, or to a POST of a body."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, raw, {"content-type": kind})) as answer:
        return json.load(answer)


def made(url: str) -> dict[str, str]:
    """Make everything; return ids by the names of the parameters that take them."""
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
    lines = [f'"path.{name}" = "{id_}"' for name, id_ in made(url).items()]
    path.write_text("\n".join(["[parameters]", *lines, ""]))


if __name__ == "__main__":
    main()
