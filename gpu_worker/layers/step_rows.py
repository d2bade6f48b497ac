"""Maps a step's rows to adapters, in the form that kernels read."""

from __future__ import annotations

import numpy as np
import torch

from gpu_worker.layers.apply_extras import ExtraRows
from gpu_worker.layers.extras import Extras
from lora_kernels import ops


def lora_batch(slots: np.ndarray, scales: np.ndarray, device: torch.device) -> ops.LoraBatch | None:
    """Return the work list of LoRA rows, None if there are none. slots: int32 [T], -1: none. scales: float32 [T]."""
    if (slots < 0).all():
        return None
    return ops.build_lora_batch(slots, device, None if (scales == 1).all() else scales)


def extra_rows(extras: Extras, rows: np.ndarray, active: np.ndarray, scale: float, device: torch.device) -> ExtraRows:
    """Return the rows of one adapter's extras, on the device.

    rows: int [n]. active: bool [n], where its LoRA applies.
    """
    whole = torch.from_numpy(rows.astype(np.int64)).to(device)
    part = whole if active.all() else torch.from_numpy(rows[active].astype(np.int64)).to(device)
    return ExtraRows(extras, whole, part, scale)
