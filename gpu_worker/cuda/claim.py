"""Chooses a GPU for a worker whose machine shows the same GPUs to all workers, such as replicas of a container."""

from __future__ import annotations

import fcntl
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from protocol.wire.errors import Conflict


def claim_gpu(gpus: Sequence[str], folder: Path, environment: MutableMapping[str, str] = os.environ) -> str:
    """Claim the first of these GPUs that no other worker holds, for the lifetime of this process. Return its id.

    gpus: ids as in CUDA_VISIBLE_DEVICES, which is set to the claimed one; CUDA must not be in use yet. folder: for lock
    files, shared by all workers of the machine; created if missing. Raises Conflict if all are held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        lock = os.open(folder / f"{gpu.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        environment["CUDA_VISIBLE_DEVICES"] = gpu  # the lock stays open until the process ends
        return gpu
    raise Conflict(f"all GPUs of this machine's workers ({', '.join(gpus)}) are in use by other workers")
