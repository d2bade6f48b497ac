"""Replaces the sandbox's process in tests: does what a template or grammar says, including hostile actions.

Arguments: its first output, the id of its parent, and the path of a tokenizer. Two special values of the first argument
select how it starts: "mute" never writes, "dies" exits immediately.
"""

from __future__ import annotations

import os
import signal
import sys

import msgspec

from gateway.sandbox.child import SIZE_BYTES, Answer, Render, SandboxJob, framed


def main() -> None:
    """Run jobs until standard input ends."""
    first = sys.argv[1]
    if first == "dies":
        sys.exit(3)
    if first != "mute":
        os.write(1, first.encode())
    while head := os.read(0, SIZE_BYTES):
        size, payload = int.from_bytes(head, "little"), b""
        while len(payload) < size:
            payload += os.read(0, size - len(payload))
        job = msgspec.msgpack.decode(payload, type=SandboxJob)
        word, _, rest = (job.source if isinstance(job, Render) else job.grammar).partition(" ")
        if word == "say":
            os.write(1, framed(Answer(rest if isinstance(job, Render) else "")))
        elif word == "write":  # writes these bytes, given in hexadecimal
            os.write(1, bytes.fromhex(rest))
        elif word == "spin":
            while True:
                pass
        elif word == "signal":
            os.kill(os.getpid(), int(rest))
        elif word == "close":
            os.close(0)
            os.close(1)
            signal.pause()
        elif word == "wait":
            signal.pause()
        elif word == "worn":
            os.write(1, framed(Answer(rest, worn=True)))


if __name__ == "__main__":
    main()
