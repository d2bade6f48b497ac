"""An untouched model's logits for random prompts, cached by an earlier start so that later ones need not rerun it.

Running it reads every weight several times: a second per billion weights. Comparing our blocks with its modules does
too, so the list of blocks that agreed is cached as well. Every start compares its finished engine with cached answers
as it would with fresh ones. The key covers all that the answers depend on: the state of the model's files, of the code
that runs it and of ours, library versions and the CPU. The files are beside the native kernels.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import gpu_worker
import lora_kernels
from gpu_worker.light_imports import state_of
from gpu_worker.model.logits_check import LogitsCheck
from gpu_worker.quantised.modules import has_rounded_inputs
from gpu_worker.quantised.panels import PANELS
from lora_kernels import ops, sums
from protocol.runtime.model_files import cache_folder
from protocol.runtime.private_files import is_own

logger = logging.getLogger(__name__)

MAX_KEPT = 8
"""Maximum number of models with stored answers, most recently written first: some ten megabytes each."""


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """The file of one model's cached answers, which may not exist."""

    path: Path

    def read(self) -> tuple[LogitsCheck, int] | None:
        """Return the answers and the width of hidden states (0: unavailable), None if nothing is cached.

        Files that another user may have written are not trusted.
        """
        if not is_own(self.path):
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata()
                num, width, sensitivity = int(about["num"]), int(about["width"]), float(about["sensitivity"])
                agreed = frozenset(about["agreed"].split("\n")) if "agreed" in about else None
                prompts, logits = ([file.get_tensor(f"{part}.{i}") for i in range(num)] for part in ("ids", "logits"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning(
                "the stored answers in %s cannot be read; running the model's self-test again: %s", self.path, error
            )
            return None
        logger.info("running self-test against the answers stored in %s", self.path)
        return LogitsCheck(prompts, logits, sensitivity, str(self.path), agreed), width

    def write(self, check: LogitsCheck, width: int) -> None:
        """Cache answers that the finished engine has reproduced, replacing those of the model's earlier versions.

        width: of hidden states.
        """
        if check.origin:  # they were read from the cache
            return
        tensors = {f"ids.{i}": ids for i, ids in enumerate(check.prompts)}
        tensors |= {f"logits.{i}": rows.contiguous() for i, rows in enumerate(check.logits)}
        about = {"num": str(len(check.prompts)), "width": str(width), "sensitivity": repr(check.sensitivity)}
        if check.agreed is not None:
            about["agreed"] = "\n".join(sorted(check.agreed))
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                save_file(tensors, Path(scratch) / "answers", about)
                for path in folder.glob(f"{self.path.name.partition('-')[0]}-*"):
                    path.unlink(missing_ok=True)
                os.replace(Path(scratch) / "answers", self.path)
            for path in sorted(folder.glob("*.safetensors"), key=_written_ns, reverse=True)[MAX_KEPT:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(
                "self-test answers cannot be stored in %s, so every start recomputes them: %s", folder, error
            )


def answers_of(module: PreTrainedModel, folder: Path, impl: ops.Impl | None) -> KeptAnswers:
    """Return the cache file for a CPU model's answers in its current state. impl: the kernels that will run it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(PANELS))
    states = [(path.name, *_state(path)) for path in files]
    code = [state_of(Path(package.__path__[0])) for package in (gpu_worker, lora_kernels)]
    libraries = (torch.__version__, transformers.__version__, *_state(Path(inspect.getfile(type(module)))))
    processor = sorted(torch.cpu.get_capabilities().items())
    computed = (type(module).__name__, str(module.dtype), impl, has_rounded_inputs(module), sums.are_fixed())
    key = repr((states, code, libraries, processor, *computed))
    name = "-".join(hashlib.sha256(part.encode()).hexdigest()[:16] for part in (str(folder.resolve()), key))
    return KeptAnswers(cache_folder() / "answers" / f"{name}.safetensors")


def _state(path: Path) -> tuple[int, int, int]:
    """Return a file's size, modification time and inode change time, which no one can set back."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _written_ns(path: Path) -> int:
    """Return the modification time of a file; 0 if another worker has just deleted it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
