"""Simon Willison's command `llm`: models from a file, prompts, streams, schemas, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MAX_TOKENS, QUESTION, Tour, differ, same


def main() -> None:
    """Use the command as its users do, with its settings in a temporary folder."""
    tour = Tour()
    with tempfile.TemporaryDirectory() as folder:
        models = [
            {
                "model_id": f"fleet-{name}", "model_name": name, "api_base": tour.v1, "api_key_name": "fleet",
                "supports_schema": True, "supports_tools": True,
            }
            for name in (tour.base, tour.adapter, "nobody-has-this")
        ]  # fmt: skip
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML too
        Path(folder, "keys.json").write_text(json.dumps({"fleet": tour.key}))
        environment = {**os.environ, "LLM_USER_PATH": folder, "LLM_LOAD_PLUGINS": ""}

        def llm(*words: str, status: int = 0) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "llm", *words], env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == status, done.stdout + done.stderr
            return (done.stdout if status == 0 else done.stderr).strip()

        greedy = ("-o", "temperature", "0", "-o", "max_tokens", str(MAX_TOKENS))
        with tour.check("base and adapter answer differently, and a stream equals the whole answer"):
            answer = llm("-m", f"fleet-{tour.adapter}", *greedy, "--no-stream", QUESTION)
            differ(llm("-m", f"fleet-{tour.base}", *greedy, "--no-stream", QUESTION), answer)
            same(llm("-m", f"fleet-{tour.adapter}", *greedy, QUESTION), answer)
        with tour.check("a schema"):
            for name in (tour.base, tour.adapter):
                wide = ("-o", "temperature", "0", "-o", "max_tokens", "300")
                held = json.loads(llm("-m", f"fleet-{name}", *wide, "--schema", "name, is_capital bool", QUESTION))
                same((type(held["name"]), type(held["is_capital"])), (str, bool))
        with tour.check("a conversation is continued"):
            assert llm("-c", "-m", f"fleet-{tour.base}", *greedy, "And of Italy?")
        with tour.check("errors"):
            assert "nobody-has-this" in llm("-m", "fleet-nobody-has-this", QUESTION, status=1)
    tour.end()


if __name__ == "__main__":
    main()
