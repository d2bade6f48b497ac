"""For any behavior of processes and cancelled calls, each answer belongs to the caller's job, and no call hangs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import msgspec
from helpers import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.sandbox.child import READY, SIZE_BYTES, Answer, Render, framed
from gateway.sandbox.sandbox import TEMPLATE_S, SandboxPool
from protocol.wire.errors import BadRequest, Unavailable

NUM = 3


class Process:
    """A process scripted by the test, which also is the transport of the gateway's socket to it."""

    pid = 1 << 23  # above Linux's maximum
    started: ClassVar[list[Process]] = []

    def __init__(self, *_: object, **__: object) -> None:
        self.protocol: asyncio.Protocol | None = None
        self.unsent = READY
        self.returncode: int | None = None
        self.asked = b""
        self.started.append(self)

    def poll(self) -> int | None:
        return self.returncode

    def write(self, data: bytes) -> None:
        self.asked += data
        source = msgspec.msgpack.decode(data[SIZE_BYTES:], type=Render).source
        self.unsent += framed(Answer(source, worn=source.endswith("7")))

    def send(self, num_bytes: int) -> None:
        """Send up to `num_bytes` of the pending output."""
        if self.protocol is not None:
            part, self.unsent = self.unsent[:num_bytes], self.unsent[num_bytes:]
            self.say(part)

    def say(self, data: bytes) -> None:
        if data and self.protocol is not None and self.returncode is None:
            self.protocol.data_received(data)

    def kill(self) -> None:
        self.die(-9)

    def die(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
            self.abort()

    def abort(self) -> None:
        if self.protocol is not None:
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)
            self.protocol = None


class Loop(asyncio.SelectorEventLoop):
    """Connects with processes scripted by the test."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self._ahead_s

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds

    async def create_unix_connection(self, factory: Callable[[], Any], *_: Any, sock: socket.socket, **__: Any) -> Any:
        sock.close()
        process = Process.started[-1]
        await asyncio.sleep(0)
        process.protocol = protocol = factory()
        protocol.connection_made(process)
        if process.returncode is not None:  # it died in the meantime
            process.abort()
        await asyncio.sleep(0)
        return process, protocol


STEP = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from("abc")),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("turn"), st.integers(1, 4)),
    st.tuples(st.just("send"), st.integers(0, 5), st.sampled_from([1, 3, 5, 9, 1000])),
    st.tuples(st.just("noise"), st.integers(0, 5), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("die"), st.integers(0, 5), st.sampled_from([-6, -9, 1])),
)


@settings(max_examples=examples.of(300), deadline=None)
@given(st.lists(STEP, max_size=60))
@example([("ask", "a"), ("turn", 3), ("send", 0, 1), ("noise", 0, b"\0")])  # all that follows is misaligned
def test_answers_are_never_mixed_up(steps: list[tuple[Any, ...]]) -> None:
    async def play() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        Process.started.clear()
        pool = SandboxPool(NUM)
        calls: list[tuple[str, asyncio.Task[str]]] = []

        def living() -> list[Process]:
            return [process for process in Process.started if process.returncode is None]

        for what, *arguments in steps:
            if what == "ask":
                text = f"{arguments[0]} {len(calls)}"
                job = Render(text, {}, [], True, {})
                calls.append((text, loop.create_task(pool.render(job, tenant=arguments[0]))))
            elif what == "cancel" and calls:
                calls[arguments[0] % len(calls)][1].cancel()
            elif what == "turn":
                for _ in range(arguments[0]):
                    await asyncio.sleep(0)
            elif living():
                process = living()[arguments[0] % len(living())]
                if what == "send":
                    process.send(arguments[1])
                elif what == "noise":
                    process.say(arguments[1])
                elif what == "die":
                    process.die(arguments[1])
            assert len(living()) <= NUM
        for _ in range(len(calls) + 1):
            for _ in range(4 * len(calls) + 20):  # in each turn, every process sends all of its output
                await asyncio.sleep(0)
                for process in living():
                    process.send(1000)
            if all(call.done() for _, call in calls):
                break
            loop.advance(TEMPLATE_S)  # noise may have announced an answer that never completes
        for text, call in calls:
            assert call.done(), f"{text} hangs"
            if not call.cancelled() and call.exception() is None:
                assert call.result() in (text, ""), "a hostile process may say nothing, but not what others are told"
            elif not call.cancelled():
                assert isinstance(call.exception(), BadRequest | Unavailable)
        await pool.close()
        assert not living()

    with patch("gateway.sandbox.process.subprocess.Popen", Process), asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(play())
