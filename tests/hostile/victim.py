"""An honest tenant: streams completions one after another, polls /health, and reports what it saw.

For each line that it reads, `python -m hostile.victim PORT KEY DTYPE` writes a `Seen` as a line of JSON: what it saw
since the last one. It has its own process, so that the attackers' work does not delay its measurements.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import orjson

PROMPT = "Once upon a time"
NUM_TOKENS = 60
POLL_S = 0.1
PATIENCE_S = 30.0
"""Seconds of silence after which an answer counts as missing."""

BODY = {
    "model": "base", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True
}  # fmt: skip


class Seen(msgspec.Struct):
    """What a victim saw in a period."""

    seconds: float = 0.0
    gaps_s: list[float] = []  # between pieces of text
    ttft_s: list[float] = []  # from a request to its first piece
    num_pieces: int = 0
    num_answers: int = 0
    num_healthy: int = 0  # answers of /health
    health_s: list[float] = []  # seconds for each of them
    errors: list[str] = []

    def gap_s(self, q: float) -> float:
        """Return the q-quantile of the gaps, rounded up to an observed one."""
        return _quantile(self.gaps_s, q)

    def first_s(self, q: float) -> float:
        """Return the q-quantile of the times to a first piece; 0 without any."""
        return _quantile(self.ttft_s or [0.0], q)

    def answer_s(self, q: float) -> float:
        """Return the q-quantile of the times of /health."""
        return _quantile(self.health_s, q)

    @property
    def rate(self) -> float:
        """Pieces of text per second."""
        return self.num_pieces / self.seconds

    def __add__(self, other: Seen) -> Seen:
        both = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Seen(*(mine + others for mine, others in both))


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values) or [math.inf]
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]


class Victim:
    """Controls the victim's process."""

    def __init__(self, port: int, key: str, dtype: str) -> None:
        command = [sys.executable, "-m", "hostile.victim", str(port), key, dtype]
        folder, pipe = Path(__file__).parents[1], subprocess.PIPE
        # Its own session is not affected by the lowered priority of the attackers' session.
        self._process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, start_new_session=True)

    async def seen(self) -> Seen:
        """Return what the victim saw since the last call."""
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> Seen:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Seen)

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


class _Watch:
    """The streams and polls in the victim's process."""

    def __init__(self, port: int, key: str, dtype: str) -> None:
        """dtype: the model's. In bfloat16 another batch may round sums differently, so the text may differ."""
        self._port = port
        self._key = key
        self._is_exact = dtype == "float32"
        self._seen = Seen()
        self._began_s = self._last_s = time.monotonic()
        self._right = ""  # the text of the first answer, which all must equal

    def take(self) -> Seen:
        """Return what was seen since the last call."""
        now_s = time.monotonic()
        seen, self._seen = self._seen, Seen()
        seen.seconds, self._began_s = now_s - self._began_s, now_s
        return seen

    async def stream(self) -> None:
        """Stream completions repeatedly."""
        while True:
            try:
                text = await self._answer()
            except (OSError, TimeoutError, ValueError, EOFError) as error:
                self._seen.errors.append(f"stream: {error!r}")
                await asyncio.sleep(POLL_S)
                continue
            self._seen.num_answers += 1
            self._right = self._right or text
            if self._is_exact and text != self._right:
                self._seen.errors.append(f"the answer was {text!r} instead of {self._right!r}")

    async def poll(self) -> None:
        """Poll /health repeatedly."""
        while True:
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    reader, writer = await self._send("GET", "/health", b"")
                    status = (await reader.readline()).split(b" ")[1:2]
                    writer.close()
                if status != [b"200"]:
                    self._seen.errors.append(f"/health: {status}")
                self._seen.num_healthy += 1
            except (OSError, TimeoutError) as error:
                self._seen.errors.append(f"/health: {error!r}")
            self._seen.health_s.append(time.monotonic() - began_s)
            await asyncio.sleep(POLL_S)

    async def _answer(self) -> str:
        """Return the text of a streamed answer. Raises ValueError unless it is complete."""
        self._last_s = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await self._send("POST", "/v1/completions", orjson.dumps(BODY))
        text, finish, is_first = "", None, True
        try:
            while True:
                async with asyncio.timeout(PATIENCE_S):
                    line = await reader.readline()
                if not line:
                    raise EOFError("the stream was cut off")
                if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    raise ValueError(f"{line!r} {(await reader.read(2000))[-300:]!r}")
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]\n":
                    if finish != "length":
                        raise ValueError(f"it ends by {finish}")
                    return text
                event = orjson.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise ValueError(str(event["error"]))
                choice = event["choices"][0]
                text, finish = text + choice["text"], choice["finish_reason"] or finish
                self._note_piece(is_first=is_first)
                is_first = False
        finally:
            writer.close()

    def _note_piece(self, *, is_first: bool) -> None:
        now_s = time.monotonic()
        (self._seen.ttft_s if is_first else self._seen.gaps_s).append(now_s - self._last_s)
        self._seen.num_pieces += 1
        self._last_s = now_s

    async def _send(self, method: str, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{self._port}", f"authorization: Bearer {self._key}"]
        lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        return reader, writer


async def _main(words: Sequence[str]) -> None:
    watch = _Watch(int(words[0]), *words[1:])
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in (watch.stream(), watch.poll())]
        while await lines.readline():
            sys.stdout.buffer.write(orjson.dumps(msgspec.to_builtins(watch.take())) + b"\n")
            sys.stdout.buffer.flush()
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(sys.argv[1:]))
