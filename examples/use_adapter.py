"""Register an adapter with a running fleet and ask it a question, from Python.

    python examples/use_adapter.py [--url http://127.0.0.1:8000] [--key KEY] NAME SOURCE QUESTION

SOURCE is a location that the fleet can reach: a Hub id (org/name), s3://bucket/prefix, or local:FOLDER, a folder in the
store's adapter folder. An adapter that has its own folder there needs no registration. With API keys, KEY needs the
scopes `infer` and `adapters`.
"""

from __future__ import annotations

import argparse
from typing import Any

import httpx2


def register(client: httpx2.Client, name: str, source: str) -> dict[str, Any]:
    """Point `name` at `source`, wait until it can be used, and return its description.

    Raises RuntimeError with the fleet's reason if the adapter is refused.
    """
    response = client.post("/v1/adapters", json={"name": name, "source": source, "wait_s": 60})
    if response.status_code not in (200, 201):  # 202 would mean that a minute was not enough
        raise RuntimeError(f"{name} cannot be used: {response.text}")
    return response.json()


def ask(client: httpx2.Client, model: str, question: str) -> str:
    """Return a model's answer. model: name of the base model or of an adapter."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 60}
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(response.text)
    return response.json()["choices"][0]["message"]["content"]


def main() -> None:
    """Register the adapter; ask the base model and the adapter the same question."""
    parser = argparse.ArgumentParser(description="Register an adapter and ask it.")
    parser.add_argument("name", help="name of the adapter")
    parser.add_argument("source", help="org/name, s3://bucket/prefix or local:FOLDER")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="API key, if the fleet requires one")
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    with httpx2.Client(base_url=args.url, headers=headers, timeout=120) as client:
        adapter = register(client, args.name, args.source)
        print(f"{args.name}: rank {adapter['rank']}, {adapter['bytes']} bytes, from {adapter['source']}")
        for model in ("base", args.name):
            print(f"{model}: {ask(client, model, args.question)}")


if __name__ == "__main__":
    main()
