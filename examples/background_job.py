"""Ask an adapter in the background, and fetch the answer later.

    python examples/background_job.py [--url http://127.0.0.1:8000] [--key KEY] MODEL QUESTION

The call returns immediately with a job. The job survives the client and the gateway that accepted it: any gateway of
the fleet can return it, for `job_ttl_s` (a day). Repeating the call with the same Idempotency-Key returns the same job,
so a client that lost its connection can simply call again.
"""

from __future__ import annotations

import argparse
import uuid
from typing import Any

import httpx2

POLL_S = 30
DONE = ("completed", "failed", "cancelled", "expired")


def start(client: httpx2.Client, model: str, question: str, key: str) -> str:
    """Submit a chat as a job and return its id; `key` is the Idempotency-Key. Raises RuntimeError if it is refused."""
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 200, "background": True,
    }  # fmt: skip
    response = client.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": key})
    if response.status_code != 202:
        raise RuntimeError(response.text)
    return response.json()["id"]


def wait(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    """Poll until the job has ended, and return it. The gateway answers at the job's end, or after POLL_S."""
    while True:
        response = client.get(f"/v1/jobs/{job_id}", headers={"Prefer": f"wait={POLL_S}"})
        if response.status_code != 200:
            raise RuntimeError(response.text)
        job = response.json()
        print(f"{job_id}: {job['status']}, {job['tokens_generated']} tokens", flush=True)
        if job["status"] in DONE:
            return job


def main() -> None:
    """Start a job, wait for it and print its answer."""
    parser = argparse.ArgumentParser(description="Ask an adapter in the background.")
    parser.add_argument("model", help="name of an adapter, or base")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="API key, if the fleet requires one")
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    with httpx2.Client(base_url=args.url, headers=headers, timeout=120) as client:
        job_id = start(client, args.model, args.question, key=uuid.uuid4().hex)
        job = wait(client, job_id)
        if job["status"] != "completed":
            raise RuntimeError(f"the job is {job['status']}: {job['error']}")
        print(job["result"]["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
