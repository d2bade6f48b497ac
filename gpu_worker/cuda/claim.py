"""Chooses a GPU for a worker whose machine shows the same GPUs to all workers, such as replicas of a container."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from protocol.runtime.file_locks import lock_first
from protocol.wire.errors import Conflict


def claim_gpu(gpus: Sequence[str], folder: Path, environment: MutableMapping[str, str] = os.environ) -> str:
    """Claim the first of these GPUs that no other worker holds, for the lifetime of this process. Return its id.

    gpus: ids as in CUDA_VISIBLE_DEVICES, which is set to the claimed one; CUDA must not be in use yet. folder: for lock
    files, shared by all workers of the machine; created if missing. Raises Conflict if all are held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    locks = {folder / f"{gpu.replace('/', '-')}.lock": gpu for gpu in gpus}
    lock = lock_first(locks)
    if lock is None:
        raise Conflict(f"all GPUs of this machine's workers ({', '.join(gpus)}) are in use by other workers")
    environment["CUDA_VISIBLE_DEVICES"] = locks[lock]
    return locks[lock]
