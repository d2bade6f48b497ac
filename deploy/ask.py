"""Ask a fleet's base model and all adapters the same questions at once; print the answers as JSON.

    python deploy/ask.py URL NUM_PER_MODEL NUM_TOKENS [ADAPTER ...]

Waits until the named adapters are served. Needs only Python. Decoding is greedy, so the answers are the same each time.
The exit code is 1 if an adapter does not appear, or an answer fails or is too short.
"""

import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

TIMEOUT_S = 600
ADAPTERS_WITHIN_S = 60  # the store reads its folder while the model loads


def get(url: str, body: dict[str, object] | None = None) -> dict:
    """Return the JSON answer to a GET, or to a POST if there is a body. Raises OSError for any status but 200."""
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as response:
        return json.load(response)


def models_with(url: str, adapters: list[str]) -> list[str]:
    """Return the names of all models once `adapters` are among them. Exits if they are not after a minute."""
    deadline_s = time.monotonic() + ADAPTERS_WITHIN_S
    while True:
        models = [model["id"] for model in get(f"{url}/v1/models")["data"]]
        missing = sorted(set(adapters) - set(models))
        if not missing:
            return models
        if time.monotonic() > deadline_s:
            sys.exit(f"not served: {', '.join(missing)}; served: {', '.join(models)}")
        time.sleep(0.2)


def ask(url: str, model: str, number: int, num_tokens: int) -> tuple[str, str]:
    """Return (name of the question, answer). Exits unless the answer has exactly `num_tokens` tokens."""
    body = {
        "model": model, "prompt": f"Question {number}: why is the sky blue? Answer:", "max_tokens": num_tokens,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    answer = get(f"{url}/v1/completions", body)
    if answer["usage"]["completion_tokens"] != num_tokens:
        sys.exit(f"{model} {number}: {answer['usage']} instead of {num_tokens} tokens")
    return f"{model} {number}", answer["choices"][0]["text"]


def main() -> None:
    """Ask all questions, and print the answers sorted by question."""
    url, num_per_model, num_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    models = models_with(url, sys.argv[4:])
    questions = [(model, number) for number in range(num_per_model) for model in models]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = dict(pool.map(lambda question: ask(url, *question, num_tokens), questions))
    json.dump(answers, sys.stdout, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
