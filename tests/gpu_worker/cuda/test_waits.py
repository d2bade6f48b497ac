"""The detection of host waits for a GPU emits no warning itself: in these tests a warning is an error."""

from __future__ import annotations

import warnings

import pytest
import torch

from gpu_worker.cuda.waits import is_wait, no_waits


def test_the_mode_is_set_and_taken_back_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []

    def set_mode(mode: object) -> None:  # torch warns here too
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all.", stacklevel=2)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with no_waits():
        assert modes == ["error"]
    assert modes == ["error", 0]


def test_only_a_wait_is_taken_for_one() -> None:
    assert is_wait(RuntimeError("called a synchronizing CUDA operation"))
    assert not is_wait(RuntimeError("out of memory"))
