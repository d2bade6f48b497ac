"""`lorafleet demo` starts a small model with the adapters of `examples/`, and asks all of them one question at once."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import httpx2
import orjson
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorafleet.fetch import fetch_model
from lorafleet.launcher.fleet import local_url
from lorafleet.launcher.screen import Screen
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser
from lorafleet.up import MAIN_FLAGS, LaunchPlan, launch
from protocol.queue.bus import Bus, decode
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Internal, LorafleetError, Unavailable
from protocol.wire.lines import aiter_lines

EXAMPLES = Path(__file__).parents[1] / "examples" / "adapters"
QUESTION = "Why is the sky blue?"
TOKENS = 80
COLORS = ("white", "cyan", "magenta", "green", "yellow", "blue")


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.usage = f"{parser.prog} [flags]"
    parser.add_argument("--question", default=QUESTION, help="the question (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="maximum tokens per answer (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="stop after the answers instead of continuing to serve")
    add_settings(parser, first=("model", *MAIN_FLAGS), skip=("worker_name", "store_url"))


def run(args: argparse.Namespace) -> int:
    """Run the demo; return the exit code."""
    settings = load_settings(args)
    if settings.api_keys:
        raise BadRequest("--api-keys: the demo does not send an API key; use this flag with `lorafleet up`")
    if not settings.model:
        settings = settings.model_copy(update={"model": str(fetch_model(settings))})
    if settings.adapters is None:
        if not EXAMPLES.is_dir():
            raise BadRequest("--adapters: the example adapters are only in the repository; give a folder of adapters")
        settings = settings.model_copy(update={"adapters": EXAMPLES})

    async def on_ready(plan: LaunchPlan, screen: Screen) -> bool:
        names = await model_names(plan.settings)
        await show_answers(plan, screen, names, args.question, args.tokens)
        if not args.once:
            screen.say("\nThe fleet continues to serve. Send it requests, or stop it with Ctrl-C:\n")
            for name in names:
                screen.say(escape(plan.curl(name, args.question)))
        return not args.once

    return launch(settings, on_ready)


@dataclass(slots=True)
class StreamedAnswer:
    """One model's answer while it streams in."""

    model: str
    text: str = ""
    num_tokens: int = 0


async def model_names(settings: Settings) -> list[str]:
    """Wait until the store has read the whole adapter folder; return the names of the base and the adapters.

    Raises Unavailable after a minute.
    """
    folder = settings.adapters or EXAMPLES
    expected = len(list(folder.glob("*/adapter_config.json")))
    try:
        async with asyncio.timeout(60), httpx2.AsyncClient(base_url=local_url(settings), trust_env=False) as client:
            while True:
                models = (await client.get("/v1/models")).raise_for_status().json()["data"]
                if len(models) > expected:
                    return [model["id"] for model in models]
                await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise Unavailable(f"the store does not list the {expected} adapters of {folder}; see its log") from error


async def show_answers(plan: LaunchPlan, screen: Screen, names: list[str], question: str, max_tokens: int) -> None:
    """Ask all models at once, show the answers as they stream in, and print how many engine steps they shared.

    max_tokens: maximum tokens of each answer.
    """
    answers = [StreamedAnswer(name) for name in names]
    screen.say(f"\n[bold]{escape(question)}[/]")
    live = Live(console=screen.console, auto_refresh=False)

    def show() -> None:
        live.update(_panels(answers), refresh=screen.console.is_terminal)

    async with httpx2.AsyncClient(base_url=local_url(plan.settings), timeout=300, trust_env=False) as client:
        # One token each loads the adapters first, so that the measured answers show the batch without the loading.
        await _ask_all(client, [StreamedAnswer(name) for name in names], question, 1, lambda: None)
        started = time.monotonic()
        with live:
            await _ask_all(client, answers, question, max_tokens, show)
    seconds = time.monotonic() - started
    num_tokens = sum(answer.num_tokens for answer in answers)
    num_shared, num_steps = await shared_steps(plan, len(answers))
    screen.say(
        f"\n{len(answers)} models, {num_tokens} tokens, {seconds:.1f} s: {num_tokens / seconds:.0f} tokens/s. "
        f"{num_shared} of {num_steps} engine steps generated a token for all {len(answers)} models."
    )


async def _ask_all(
    client: httpx2.AsyncClient, answers: list[StreamedAnswer], question: str, max_tokens: int, show: Callable[[], None]
) -> None:
    """Stream all answers at once. Raises the first failure."""
    try:
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(_ask(client, answer, question, max_tokens, show))
    except* (LorafleetError, httpx2.HTTPError) as failed:
        raise failed.exceptions[0] from None


async def _ask(
    client: httpx2.AsyncClient, answer: StreamedAnswer, question: str, max_tokens: int, show: Callable[[], None]
) -> None:
    """Stream one answer into `answer`. Raises Internal if the fleet refuses the request."""
    body = {
        "model": answer.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise Internal(f"{answer.model}: {(await response.aread()).decode()}")
        async for line in aiter_lines(response.aiter_bytes()):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = orjson.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise Internal(f"{answer.model}: {chunk['error']['message']}")
            answer.text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            answer.num_tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.num_tokens)
            show()


async def shared_steps(plan: LaunchPlan, num_models: int) -> tuple[int, int]:
    """Return how many of the latest engine steps had tokens of `num_models` requests, and the number of all steps.

    Steps are counted in the gateways' output streams, which keep one entry per step for a minute, and which the queue
    user of gateways may read.
    """
    door = plan.queue.door("gateway") if plan.queue is not None else {}
    bus = Bus(plan.settings.model_copy(update=door).queue_url())
    try:
        sizes: list[int] = []
        for gid in await bus.members.ids(bus.keys.gateways):
            for _, fields in await bus.streams.entries(bus.keys.out(gid)):
                deltas = decode(fields[b"b"], list[m.Delta])
                sizes.append(len({delta.rid for delta in deltas if delta.ids}))
    finally:
        await bus.close()
    return sum(size == num_models for size in sizes), sum(size > 0 for size in sizes)


def _panels(answers: list[StreamedAnswer]) -> Table:
    grid = Table.grid(expand=True)
    for _ in range(2):
        grid.add_column(ratio=1)
    panels = [
        Panel(Text(answer.text.strip()), title=f"[bold]{escape(answer.model)}[/]", border_style=color, expand=True)
        for answer, color in zip(answers, cycle(COLORS), strict=False)
    ]
    for i in range(0, len(panels), 2):
        grid.add_row(*panels[i : i + 2])
    return grid
