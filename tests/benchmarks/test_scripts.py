"""Shared parts of benchmark scripts: adapters that differ, and a slow link that changes no byte."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks.common import report
from benchmarks.common.fleet import make_adapters
from benchmarks.common.slow_link import Link, slow_link
from benchmarks.peers.in_process import masked
from gpu_worker.adapters.loader.fetch import FetchedAdapter, digest_of
from peft_adapters.format import parse_config
from protocol.runtime.environment import child_environment

PROCESSOR = Path("/proc/cpuinfo")
CAN_HIDE = PROCESSOR.exists() and {"cpuid_fault", "avx512f"} <= {*PROCESSOR.read_text().split()} and shutil.which("gcc")


def test_adapters_that_share_a_file_are_different_adapters(tmp_path: Path) -> None:
    model, root = tmp_path / "model", tmp_path / "adapters"
    LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(model)
    names = [f"adapter-{index}" for index in range(6)]
    make_adapters(model, root, names, ranks=[2, 3])
    folders = [root / name for name in names]
    assert len({(folder / "adapter_model.safetensors").stat().st_ino for folder in folders}) == 2
    files = [
        FetchedAdapter(
            parse_config((folder / "adapter_config.json").read_bytes()),
            (folder / "adapter_model.safetensors").read_bytes(),
        )
        for folder in folders
    ]
    assert len({digest_of(one) for one in files}) == len(names)


def test_a_slow_link_changes_no_byte() -> None:
    sent = bytes(range(256)) * 1000
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_answer, args=(server, sent))
        thread.start()
        link = Link(server.getsockname()[1], latency_s=0.0, bytes_per_s=1e9)
        with slow_link(link) as port, socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"please")
            received = b""
            while piece := client.recv(1 << 16):
                received += piece
        thread.join()
    assert received == sent


@pytest.mark.skipif(not CAN_HIDE, reason="the processor has no AVX-512, or hides none, or there is no compiler")
def test_a_masked_program_does_not_see_what_its_set_lacks(tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    for isa in ("avx2", "avx512"):
        command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
        environment = child_environment() | masked(isa, tmp_path)
        seen[isa] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert seen == {"avx2": "AVX2", "avx512": "AVX512"}


def test_scripts_use_the_arguments_that_they_take() -> None:
    ignored: list[str] = []
    for script in Path(report.__file__).parents[1].rglob("*.py"):
        text = script.read_text()
        for without in re.findall(r"report\.parser\(__doc__(?:, without=\((.*)\))?\)", text):
            used = [name for name in ("model", "short", "out") if f"args.{name}" in text or f'"{name}"' in without]
            ignored += [f"{script.name} --{name}" for name in ("model", "short", "out") if name not in used]
    assert ignored == []


def _answer(server: socket.socket, body: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        assert connection.recv(100) == b"please"
        connection.sendall(body)
