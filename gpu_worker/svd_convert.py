"""`python -m gpu_worker.svd_convert MODEL SRC DST KEEP` converts a PEFT adapter of another kind to LoRA.

PEFT decomposes each layer's change and keeps the fewest singular values that hold the share KEEP of its Frobenius norm.
The result is an approximation; the error of each layer is written into its config. Runs as its own process, so that
other services need no torch, and so that a store can limit it: the adapters are untrusted input.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpu_worker.loading.checkpoint import CLASSES, read_config, task_of
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.kinds.converted import CONVERTED_FIELD
from protocol.runtime.model_files import WEIGHT_FILES, model_folder
from protocol.wire.errors import BadRequest, LorafleetError

_ADAPTER = "default"


def convert(model: str, source: Path, target: Path, keep: float) -> dict[str, float]:
    """Write an adapter as LoRA into a folder; return the relative error of each layer, in the Frobenius norm.

    model: the base, a folder or a Hub id. keep: the share of the norm of each layer's change to keep, 0 to 1. The
    target folder appears only when complete. Raises BadRequest for a kind that PEFT cannot convert, for fields and
    tensors that PEFT would ignore, and for numbers that are not finite; OSError for a folder that cannot be written.
    """
    folder = model_folder(model, WEIGHT_FILES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is checked below, or what the adapter's owner knows
        _check_fields(source)
        base = CLASSES[task_of(read_config(folder))].from_pretrained(folder, dtype=torch.float32)
        adapted: Any = PeftModel.from_pretrained(base, str(source)).eval()
    kind = str(adapted.peft_config[_ADAPTER].peft_type.value)
    _check_tensors(adapted, source)
    try:
        with torch.no_grad():
            config, tensors = convert_to_lora(adapted, rank=keep * keep, adapter_name=_ADAPTER)  # share of squared norm
            errors = _errors(adapted, tensors)
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise BadRequest(f"{kind} cannot be converted to LoRA by PEFT: {error}") from error
    if bad := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise BadRequest(f"{kind}: what it adds is not finite, or has no finite norm, at {', '.join(bad[:5])}")
    record = {"peft_type": kind, "keep": keep, "errors": errors}
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write to a temporary folder first, so that a failure leaves no incomplete target.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        made = Path(scratch) / "adapter"
        made.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / WEIGHTS_FILE)
        config.save_pretrained(str(made))
        path = made / CONFIG_FILE
        fields = json.loads(path.read_text()) | {CONVERTED_FIELD: record}
        path.write_text(json.dumps(fields, indent=2, allow_nan=False))
        made.rename(target)
    return errors


def _errors(adapted: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Return |D - B A| / |D| by layer, where D is the adapter's change of the weight; 0 if D is 0."""
    found: dict[str, float] = {}
    for name, module in adapted.named_modules():
        a, b = (tensors.get(f"{name}.lora_{half}.weight") for half in "AB")
        if a is None or b is None:
            continue
        base: Any = module
        before = base.get_base_layer().weight.detach().clone()
        base.merge()
        added = (base.get_base_layer().weight.detach() - before).double()
        base.unmerge()
        product = b.double() @ a.double()
        added = added.T if added.shape != product.shape else added
        norm = added.norm()
        found[name.removeprefix("base_model.model.")] = float((added - product).norm() / norm) if norm else 0.0
    return found


def _check_fields(source: Path) -> None:
    """Raise BadRequest for a config with fields that this version of PEFT does not know and would ignore."""
    fields = json.loads((source / CONFIG_FILE).read_bytes())
    known = {field.name for field in dataclasses.fields(type(PeftConfig.from_pretrained(str(source))))}
    if unknown := sorted(name for name, value in fields.items() if value and name not in known):
        raise BadRequest(f"config fields that are not understood: {', '.join(unknown[:5])}")


def _check_tensors(adapted: Any, source: Path) -> None:
    """Raise BadRequest unless the file has exactly the tensors that PEFT saves for the loaded adapter."""
    with safe_open(source / WEIGHTS_FILE, "pt") as file:
        found = set(file.keys())
    wanted = set(get_peft_model_state_dict(adapted, adapter_name=_ADAPTER, save_embedding_layers=False))
    for names, what in ((found - wanted, "fit nothing"), (wanted - found, "are missing")):
        if names:
            raise BadRequest(f"tensors that {what}: {', '.join(sorted(names)[:5])}")


def _limit(most_bytes: int, file_bytes: int) -> None:
    """Limit this process's memory and file size, and make it die with its parent.

    Exceeding the memory raises MemoryError or RuntimeError; a larger file raises OSError.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if sys.platform == "linux":
        parent, set_death_signal = os.getppid(), 1
        if ctypes.CDLL(None).prctl(set_death_signal, ctypes.c_ulong(signal.SIGKILL)) or os.getppid() != parent:
            sys.exit("the process that asked for the conversion has ended")


def main() -> int:
    """Convert the adapter named on the command line and print the errors as JSON; return the exit code."""
    parser = argparse.ArgumentParser()
    for name in ("model", "source", "target"):
        parser.add_argument(name)
    parser.add_argument("keep", type=float)
    parser.add_argument("--memory", type=int, default=0, help="bytes that the process may have; 0: any number")
    parser.add_argument("--file", type=int, default=0, help="bytes that a file of its may have")
    args = parser.parse_args()
    if args.memory:
        _limit(args.memory, args.file)
    try:
        print(json.dumps(convert(args.model, Path(args.source), Path(args.target), args.keep)))
    except (LorafleetError, OSError) as error:
        print(error.message if isinstance(error, LorafleetError) else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
