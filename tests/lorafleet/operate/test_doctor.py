"""The doctor's probes of gateway, queue, memory and compiler find the fault prepared for each."""

from __future__ import annotations

import asyncio
import json
import os
from functools import partial
from pathlib import Path

import pytest
from helpers.scripted_fleet import make_model_folder, running_gateway
from helpers.waiting import wait_until

from lorafleet.__main__ import main
from lorafleet.launcher.embedded import start_embedded
from lorafleet.operate.doctor import free_gpu_bytes, free_memory_bytes, weight_bytes
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, str]]:
    """Run the doctor, which must find a problem, and return its findings by name."""
    assert main(["doctor", "--json", *words, "--url", "http://127.0.0.1:9"]) == 1
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def test_a_fleet_that_is_not_there_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--data", str(tmp_path / "none" / "of" / "it"))
    assert (found["gateway"]["level"], found["queue"]["level"]) == ("problem", "problem")
    assert "--url" in found["gateway"]["advice"]
    assert "--redis-url" in found["queue"]["advice"]
    found = told(capsys, "--redis-url", f"unix://{tmp_path}/none.sock", "--data", str(tmp_path))
    assert "cannot reach the queue" in found["queue"]["text"]


async def test_a_fleet_with_keys_asks_for_one(
    bus: Bus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    async with running_gateway(bus, make_model_folder(tmp_path / "model"), api_keys=True) as gateway:
        words = ("doctor", "--json", "--data", str(tmp_path), "--url", gateway.url)
        assert await asyncio.to_thread(main, words) == 1
        found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
        assert await asyncio.to_thread(main, ("adapters", "list", "--url", gateway.url)) == 2
        assert "no API key was given; give a valid key with --api-key-file" in capsys.readouterr().err
    assert found["gateway"]["text"].endswith("requires an API key: no API key was given")
    assert "--api-key-file" in found["gateway"]["advice"]
    assert "start the fleet" not in found["gateway"]["advice"]


async def test_the_version_of_a_gateway_with_keys_is_known(
    bus: Bus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _ = await bus.api_keys.create("ops", ["admin"])
    async with running_gateway(bus, make_model_folder(tmp_path / "model"), api_keys=True) as gateway:
        words = ("doctor", "--json", "--data", str(tmp_path), "--url", gateway.url, "--redis-url", bus.url)
        await wait_until(partial(is_listed, bus, gateway.url), "the gateway has sent a heartbeat")
        await asyncio.to_thread(main, (*words, "--key", key))
    found = [one for one in json.loads(capsys.readouterr().out) if one["name"] == "versions"]
    assert [one["level"] for one in found] == ["ok"], found


async def is_listed(bus: Bus, url: str) -> bool:
    return url in await bus.members.gateway_urls()


def test_a_queue_without_services_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_embedded(tmp_path / "queue", durable=False)
    try:
        found = told(capsys, "--redis-url", server.url, "--data", str(tmp_path))
    finally:
        server.stop()
    assert found["queue"]["level"] == "ok"
    assert found["scheduler"]["advice"].endswith("lorafleet serve scheduler")
    assert found["workers"]["level"] == "problem"


def test_a_gateway_elsewhere_has_no_queue_in_this_machines_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().data == tmp_path / ".cache" / "lorafleet"
    server = start_embedded(Settings().data / "queue" / "of-another-fleet", durable=False)
    try:
        found: list[str] = []
        for url in ("http://gateway.invalid:9", "http://127.0.0.1:9"):
            assert main(["doctor", "--json", "--url", url]) == 1
            findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
            found.append(findings["queue"]["text"])
    finally:
        server.stop()
    assert "no queue of it is on this machine" in found[0]
    assert server.socket.name not in found[0]
    assert "no queue of it" not in found[1]


def test_a_wrong_password_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_embedded(tmp_path / "queue", durable=False, guarded=True)
    try:
        (tmp_path / "password").write_text("wrong")
        door = ["--redis-url", f"unix://operator@{server.socket}", "--redis-password-file", str(tmp_path / "password")]
        found = told(capsys, *door, "--data", str(tmp_path))
    finally:
        server.stop()
    assert "invalid username-password" in found["queue"]["text"]
    assert "--redis-password-file" in found["queue"]["advice"]


def test_a_model_that_is_not_here_has_no_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--model", "org/name", "--data", str(tmp_path))
    assert found["model"]["advice"].startswith("lorafleet fetch org/name")
    assert weight_bytes(tmp_path) is None
    for name, size in (("a.safetensors", 300), ("b.safetensors", 20), ("config.json", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 320
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"x" * 96)
    assert weight_bytes(tmp_path / "model.gguf") == 100


def test_a_model_larger_than_memory_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 43)  # a sparse file, which takes no space on the disk
    found = told(capsys, "--model", str(tmp_path), "--device", "cpu", "--data", str(tmp_path))
    assert found["model in memory"]["level"] == "problem"
    assert "--quantization" in found["model in memory"]["advice"]


def test_free_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable:   12 kB\n")
    assert free_memory_bytes(tmp_path / "meminfo") == 12 * 1024
    assert free_memory_bytes(tmp_path / "none") > 12 * 1024  # all the memory this process may use


def test_free_gpu_memory_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0, 1000\\n1, [N/A]\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert free_gpu_bytes() == {"GPU 0": 1000 << 20}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert free_gpu_bytes() == {}


def test_a_compiler_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path))
    found = told(capsys, "--data", str(tmp_path))
    assert found["compiler"]["level"] == "warning"
    assert "g++" in found["compiler"]["advice"]
    (tmp_path / "lora_kernels-0.so").touch()  # the PyTorch operations, without the kernels for an instruction set
    assert told(capsys, "--data", str(tmp_path))["compiler"]["level"] == "warning"
    (tmp_path / "lora_kernels-0-avx2.so").touch()
    assert told(capsys, "--data", str(tmp_path))["compiler"]["level"] == "ok"
