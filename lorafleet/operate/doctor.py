"""`lorafleet doctor` checks a fleet and this machine, and suggests a fix for each problem."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path

import httpx2
from rich.console import Console
from rich.markup import escape

from lorafleet.launcher.embedded import with_queue
from lorafleet.launcher.machine import memory_bytes
from lorafleet.operate import checkup
from lorafleet.operate.checkup import Finding, worst
from lorafleet.shared.api import GIVE_KEY, Api, add_flags, add_json_flag, given_url, print_json
from lorafleet.shared.flags import add_settings
from lorafleet.shared.on_queue import check_is_here, load_local_settings
from lorafleet.shared.parser import Parser
from protocol.queue.bus import CONNECTION_ERRORS, Bus, QueueError
from protocol.runtime.environment import child_environment
from protocol.runtime.model_files import cache_folder, is_gguf
from protocol.runtime.release import RELEASE
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, PermissionDenied, Unauthorized

FLAGS = ("redis_url", "redis_password_file", "data", "keep_free", "model", "workers", "device")
ASK_S = 3.0
"""Timeout in seconds for reading the version of a gateway or a store."""

MARKS = {"ok": "[green]✓[/]", "skipped": "–", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    add_flags(parser)
    add_json_flag(parser)
    add_settings(parser, first=FLAGS, skip=tuple(Settings.model_fields))


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code: 1 if there is a problem. Raises BadRequest for wrong settings."""
    url = given_url(args)
    settings = load_local_settings(args, url)
    gateway, known = _of_gateway(args)
    queue = asyncio.run(_of_queue(settings, url, known, is_needed=worst(gateway) == "problem"))
    found = [*gateway, *queue, *of_machine(settings)]
    if args.json:
        print_json([asdict(finding) for finding in found])
    else:
        console = Console(highlight=False, soft_wrap=True)
        for one in found:
            console.print(f"{MARKS[one.level]} {one.name:18} {escape(one.text)}")
            if one.advice:
                console.print(f"  {'':18} [bold]→ {escape(one.advice)}[/]")
    return int(worst(found) == "problem")


# ------------------------------------------------------------ the fleet


def _of_gateway(args: argparse.Namespace) -> tuple[list[Finding], dict[str, str]]:
    """Check the gateway over HTTP; also return its version by URL. Raises BadRequest for a bad profile."""
    with Api(args) as api:
        try:
            health = api.health()
            state = health["status"]
            answer = api.request("GET", "/version")
        except (Unauthorized, PermissionDenied) as error:
            advice = "give an API key: --api-key-file or $OPENAI_API_KEY; `lorafleet keys create` makes one"
            text = f"{api.url} requires an API key: {error.message.removesuffix(GIVE_KEY)}"
            return [Finding("gateway", "problem", text, advice)], {}
        except LorafleetError as error:
            advice = "start the fleet with `lorafleet up`, or give its address: --url"
            return [Finding("gateway", "problem", error.message.partition("; start a fleet")[0], advice)], {}
    known = {api.url: str(answer.json().get("version", ""))}
    if state != "ready":
        advice = "see what is wrong with the workers and the queue below, and their logs: `lorafleet logs`"
        return [Finding("gateway", "problem", f"{api.url} is not ready: {state}", advice)], known
    date = parsedate_to_datetime(answer.headers["date"]).timestamp() if "date" in answer.headers else None
    found = [Finding("gateway", "ok", f"{api.url} is {state}"), *checkup.of_history(health.get("history"))]
    if date is not None:  # the header has whole seconds
        ahead_ms = 1000 * (date + 0.5 - time.time())
        found.append(checkup.of_clock("gateway clock", ahead_ms if abs(ahead_ms) > 1500 else 0.0))
    return found, known


async def _of_queue(settings: Settings, url: str, known: Mapping[str, str], *, is_needed: bool) -> list[Finding]:
    """Check the queue of the gateway at `url`.

    known: URL -> version of gateways that show it; those with API keys do not.
    is_needed: whether it is a problem if no queue is named or found on this machine.
    """
    try:
        check_is_here(settings, url)
        named = with_queue(settings)
        url = named.queue_url()
    except LorafleetError as error:
        if not is_needed and "redis_url" not in settings.model_fields_set:
            text = "not checked: no queue on this machine; to check it, give --redis-url and --redis-password-file"
            return [Finding("queue", "skipped", text)]
        return [
            Finding("queue", "problem", error.message, "give its URL and password: --redis-url, --redis-password-file")
        ]
    bus = Bus(url)
    try:
        facts = await bus.server.facts()
        beats = await bus.members.worker_beats()
        status = await bus.get(bus.keys.status, m.SchedulerStatus)
        bases, failures = await bus.members.bases()
        gateways, stores = await bus.members.gateway_urls(), await bus.members.store_urls()
    except CONNECTION_ERRORS as error:
        text = f"cannot reach the queue at {named.redis_url}: {error}"
        advice = "start it, or give another URL: --redis-url, with the operator's password: --redis-password-file"
        return [Finding("queue", "problem", text, advice)]
    except QueueError as error:
        text = f"the queue refused: {error}"
        return [Finding("queue", "problem", text, "give the operator's password: --redis-password-file")]
    finally:
        await bus.close()
    async with httpx2.AsyncClient(timeout=ASK_S, trust_env=False) as http:
        asked = [(f"gateway {one}", f"{one}/version") for one in gateways if one not in known]
        asked += [(f"store {one}", f"{one}/health") for one in stores]
        found_versions = await asyncio.gather(*(_version(http, url) for _, url in asked))
    versions = {name: found for (name, _), found in zip(asked, found_versions, strict=True)}
    versions |= {f"gateway {one}": known[one] for one in gateways if one in known}
    of_members = checkup.of_members(beats, status, versions, RELEASE)
    return [*checkup.of_queue(facts), *of_members, *checkup.of_bases(bases, failures, beats)]


async def _version(http: httpx2.AsyncClient, url: str) -> str:
    """Return the version that a service reports, "" if it does not respond."""
    try:
        return str((await http.get(url)).json().get("version", ""))
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, AttributeError):
        return ""


# ------------------------------------------------------------ this machine


def of_machine(settings: Settings) -> list[Finding]:
    """Check this machine's disks, memory and compiler."""
    data = next(path for path in (settings.data, *settings.data.absolute().parents) if path.exists())
    disk = shutil.disk_usage(data)
    found = [checkup.of_disk("disk", str(settings.data), disk.free, disk.total, settings.keep_free)]
    if settings.model:
        found += _of_model(settings)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    is_built = any(cache_folder().glob("lora_kernels-*-*.so"))  # one instruction set's kernels
    shipped = _kernels_folder() / "cpu/lora_kernels.so"
    of_compiler = checkup.of_compiler(platform.machine(), compiler, is_shipped=shipped.exists(), is_built=is_built)
    return [*found, of_compiler]


def _kernels_folder() -> Path:
    """Return the folder of lora_kernels, without importing it and torch."""
    found = find_spec("lora_kernels")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _of_model(settings: Settings) -> list[Finding]:
    num_bytes = weight_bytes(Path(settings.model).expanduser())
    if num_bytes is None:
        text = f"{settings.model} is not on this machine as a folder or file, so its size is unknown"
        return [Finding("model", "warning", text, f"lorafleet fetch {settings.model}, then give its folder: --model")]
    gpus = free_gpu_bytes() if settings.device != "cpu" else {}
    return checkup.of_model(num_bytes, gpus or {"memory": free_memory_bytes()}, workers=max(1, settings.workers))


def weight_bytes(model: Path) -> int | None:
    """Return the bytes of a model's weights on disk, None without any."""
    if is_gguf(model):
        return model.stat().st_size
    files = list(model.glob("*.safetensors")) if model.is_dir() else []
    return sum(file.stat().st_size for file in files) if files else None


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes of memory available to a new process: free memory of this machine or the container."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return min(int(lines["MemAvailable"].split()[0]) * 1024, memory_bytes())
    except (OSError, KeyError, ValueError):
        return memory_bytes()


def free_gpu_bytes() -> Mapping[str, int]:
    """Return the free bytes of each GPU, as nvidia-smi reports them; {} without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    environment = child_environment("CUDA_*", "NVIDIA_*")
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)
    rows = [line.split(",") for line in listed.stdout.splitlines()] if listed.returncode == 0 else []
    return {f"GPU {index.strip()}": int(free) << 20 for index, free in rows if free.strip().isdecimal()}
