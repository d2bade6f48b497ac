"""Which GPU a worker takes where the workers of one machine all see the same ones, as replicas of a container do."""

from __future__ import annotations

import fcntl
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from protocol.wire.errors import Conflict


def claim_gpu(gpus: Sequence[str], folder: Path, environment: MutableMapping[str, str] = os.environ) -> str:
    """Take the first of these GPUs that no other worker holds, for as long as this process lives. Returns its id.

    gpus: ids as CUDA_VISIBLE_DEVICES takes them, which is set to the one taken; CUDA must not be in use yet. folder: of
    the locks, one that all workers of the machine share; made if it is missing. Raises Conflict if all are held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        lock = os.open(folder / f"{gpu.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        environment["CUDA_VISIBLE_DEVICES"] = gpu  # the lock stays open, and ends with the process
        return gpu
    raise Conflict(f"all GPUs of this machine's workers ({', '.join(gpus)}) are in use by other workers")
