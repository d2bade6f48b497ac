"""The resources of this machine: cores, memory, GPUs and ports."""

from __future__ import annotations

import errno
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from protocol.runtime.environment import child_environment
from protocol.wire.errors import BadRequest, Conflict

CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


def num_cores(cgroup_cpu: Path = CGROUP_CPU) -> int:
    """Return the number of cores that this process may use, by its affinity and the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_cpu.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def memory_bytes(cgroup_memory: Path = CGROUP_MEMORY) -> int:
    """Return the bytes of memory that this process may use: the machine's, or the container's limit if lower."""
    all_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = cgroup_memory.read_text().strip()
    except OSError:
        return all_bytes
    return all_bytes if limit == "max" else min(all_bytes, int(limit))


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the ids of the CUDA devices that workers may use, in the form of CUDA_VISIBLE_DEVICES."""
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    environment = child_environment("CUDA_*", "NVIDIA_*")
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)
    return listed.stdout.split() if listed.returncode == 0 else []


def claim_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0. Raises Conflict if it is in use, BadRequest if the address is unusable."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
            return probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} on {host} is in use; choose another with --port") from error
        raise BadRequest(f"cannot listen on {host} port {port}: {error.strerror}") from error
