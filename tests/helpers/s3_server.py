"""A real S3 server process (moto) that checks credentials, and a proxy that truncates bodies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import httpx2

BUCKET = "adapters"
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@dataclass(frozen=True, slots=True)
class S3Server:
    """The address of a server and the credentials that it accepts."""

    url: str
    key: str
    secret: str

    def client(self, secret: str = "", url: str = "") -> Any:
        return boto3.client(
            "s3",
            endpoint_url=url or self.url,
            region_name="us-east-1",
            aws_access_key_id=self.key,
            aws_secret_access_key=secret or self.secret,
        )


@contextmanager
def run_s3() -> Iterator[S3Server]:
    """Run a server during the block; its process also ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        yield _with_auth(url)
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def _with_auth(url: str) -> S3Server:
    """Create a user with access to S3, and make the server check every request from now on."""
    anyone = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1", "endpoint_url": url}
    iam = boto3.client("iam", **anyone)
    iam.create_user(UserName="store")
    document = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="store", PolicyName="s3", PolicyDocument=json.dumps(document))
    key = iam.create_access_key(UserName="store")["AccessKey"]
    reply = httpx2.post(f"{url}/moto-api/reset-auth", content="0", headers={"Content-Type": "text/plain"})
    assert reply.status_code == 200
    server = S3Server(url, key["AccessKeyId"], key["SecretAccessKey"])
    server.client().create_bucket(Bucket=BUCKET)
    return server


class Cutter:
    """A TCP proxy that closes its next `num_cuts` connections after `cut_at` bytes of an answer."""

    def __init__(self) -> None:
        self.url = ""
        self.cut_at = 0
        self.num_cuts = 0


@asynccontextmanager
async def run_cutter(target: str) -> AsyncIterator[Cutter]:
    """Run a proxy for the server at `target`."""
    cutter = Cutter()
    port = int(target.rpartition(":")[2])

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            with contextlib.suppress(ConnectionError):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_copy(reader, upstream_writer))
                    await _bring_back(cutter, upstream_reader, writer)
        finally:  # also if the test ends first
            upstream_writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    cutter.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield cutter
    finally:
        server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def _bring_back(cutter: Cutter, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    num_bytes = 0
    while data := await reader.read(1 << 16):
        num_bytes += len(data)
        if cutter.num_cuts and num_bytes > cutter.cut_at:
            cutter.num_cuts -= 1
            writer.write(data[: max(0, len(data) - (num_bytes - cutter.cut_at))])
            break
        writer.write(data)
        await writer.drain()
    writer.close()
