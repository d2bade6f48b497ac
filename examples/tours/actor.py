"""`python -m examples.tours.actor`: a fleet whose model outputs what its prompt specifies, for tours of agents.

Gateway, scheduler, queue and the worker's service are real; a scripted engine replaces the model. A prompt may contain
`<steps>…</steps>`, a JSON list in base64, which no agent's quoting changes. It is answered by the list's first entry,
and by the next one for every answer that follows the list in the prompt: `{"name": …, "arguments": {…}}` is a tool call
in the chat template's syntax, a string is the answer's text. Other prompts of agents, for example for titles, are
answered by `ASIDE`. So an agent's own loop runs with its own tools, which a model small enough for any machine could
not handle.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from benchmarks.common.fake_worker import FakeEngine, Running, fake_served, serve_fake
from gateway.service import serve as serve_gateway
from gpu_worker.planning.request import EngineRequest, TokenOutput
from lorafleet.launcher.embedded import start_embedded
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings
from scheduler.service import serve as serve_scheduler

TEMPLATE = Path(__file__).parents[2] / "tests" / "gateway" / "templates" / "qwen.jinja"
MODEL = "actor"
CONTEXT = 200_000
"""In tokens: the prompts of agents take tens of thousands."""
STEPS = re.compile(r"<steps>([A-Za-z0-9+/]+=*)</steps>")
ANSWER = "<|im_start|>assistant"  # the last one in a prompt begins the answer to write
ASIDE = "Notes"


def line_of(prompt: str) -> str:
    """Return the answer to a prompt, as a model would write it."""
    parts = list(STEPS.finditer(prompt))
    if not parts or "<tools>" not in prompt:
        return ASIDE
    steps = json.loads(base64.b64decode(parts[-1][1]))
    num_answers = prompt.count(ANSWER, parts[-1].end()) - 1
    step = steps[min(num_answers, len(steps) - 1)]
    return step if isinstance(step, str) else f"<tool_call>\n{json.dumps(step)}\n</tool_call>"


class Actor(FakeEngine):
    """An engine that answers by the prompts' scripts."""

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        """tokenizer: the model's. end_id: id of the token that ends an answer."""
        super().__init__(step_s=0.001, vocab_size=tokenizer.get_vocab_size())
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._lines: dict[str, list[int]] = {}

    def submit(self, request: EngineRequest) -> None:
        """Add a request."""
        prompt = self._tokenizer.decode(np.asarray(request.prompt).tolist(), skip_special_tokens=False)
        self._lines[request.rid] = [*self._tokenizer.encode(line_of(prompt)).ids, self._end_id]
        super().submit(request)

    def cancel(self, rids: Sequence[str]) -> None:
        """Drop requests."""
        super().cancel(rids)
        for rid in rids:
            self._lines.pop(rid, None)

    def _advance(self, running: Running) -> TokenOutput:
        request, line = running.request, self._lines[running.request.rid]
        seq0 = running.num_output
        running.num_output += 1
        id_ = line[seq0] if seq0 < len(line) else self._end_id
        finish = "stop" if id_ == self._end_id else "length" if running.num_output >= request.max_new_tokens else ""
        if finish:
            del self._requests[request.rid], self._lines[request.rid]
        return TokenOutput(rid=request.rid, epoch=request.epoch, seq0=seq0, ids=[id_], finish=finish)


def dress(model: Path, folder: Path) -> Path:
    """Write a model folder without weights: a tokenizer, and a chat template with tools."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    return folder


async def play(folder: Path, data: Path, settings: Settings, stop: asyncio.Event) -> int:
    """Run the fleet until `stop`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_id = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    served = msgspec.structs.replace(
        fake_served(MODEL, tokenizer.get_vocab_size()), fingerprint=MODEL, max_model_len=CONTEXT
    )
    server = await asyncio.to_thread(start_embedded, data, durable=False)
    own = settings.model_copy(update={"redis_url": server.url, "model": str(folder)})
    engine = Actor(tokenizer, end_id[0] if isinstance(end_id, list) else end_id)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(serve_scheduler(own, stop))
            group.create_task(serve_fake(own.model_copy(update={"worker_name": MODEL}), engine, served, stop))
            group.create_task(serve_gateway(own, stop))
        return 0
    finally:
        server.stop()


def main() -> int:
    """Run the fleet until a signal ends it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model whose tokenizer is used")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    settings = Settings(port=args.port)
    set_up_logging(MODEL, settings.log_level)
    folder = dress(args.model, args.data / "model")
    return run(lambda stop: play(folder, args.data / "queue", settings, stop))


if __name__ == "__main__":
    sys.exit(main())
