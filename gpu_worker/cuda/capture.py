"""Captures steps as CUDA graphs: the part of `graphs.py` that only a GPU can run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.cuda.graphs import Replay, Unrecordable
from gpu_worker.cuda.waits import is_wait, no_waits


class CudaRecorder:
    """A `GraphRecorder` for CUDA graphs. Its graphs share their memory, since one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def record(self, step: Callable[[], object]) -> Replay:
        """Run a step on a side stream, as captures require, and capture it. Raises Unrecordable."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            step()  # compiles kernels, and lets libraries allocate workspaces
            self._run_without_waiting(step)
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._side):
            step()
        return graph.replay

    def _run_without_waiting(self, step: Callable[[], object]) -> None:
        """Run a step; raise Unrecordable if the host waits for the device in it, which would ruin a capture."""
        self._side.synchronize()
        try:
            with no_waits():
                step()
        except RuntimeError as error:
            if not is_wait(error):
                raise
            raise Unrecordable("the model waits for the device in the middle of a step") from error
