"""`python -m gpu_worker.svd_convert MODEL SRC DST KEEP` writes a PEFT adapter of another kind as LoRA, by PEFT itself.

PEFT decomposes what the adapter adds to each layer, and keeps as few singular values as hold the share KEEP of its
Frobenius norm. The result is an approximation: the error of each layer is written into its config. It runs in its own
process, so that nobody else needs torch.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import save_file
from torch import Tensor

from gpu_worker.loading.checkpoint import CLASSES, read_config, task_of
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.kinds.converted import CONVERTED_FIELD
from protocol.runtime.model_files import TOKENIZER_FILES, model_folder
from protocol.wire.errors import BadRequest, LorafleetError

_ADAPTER = "default"


def convert(model: str, source: Path, target: Path, keep: float) -> dict[str, float]:
    """Write an adapter as LoRA into a folder; return the relative error of each layer, in the Frobenius norm.

    model: the base, a folder or a Hub id. keep: share of the norm of what the adapter adds to a layer, 0 to 1. The
    folder is there only when it is whole. Raises BadRequest for a kind that PEFT cannot convert, and for numbers that
    are not finite; OSError for a folder that cannot be written.
    """
    folder = model_folder(model, TOKENIZER_FILES)
    base = CLASSES[task_of(read_config(folder))].from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields and layers that the adapter's owner knows
        adapted: Any = PeftModel.from_pretrained(base, str(source)).eval()
    kind = str(adapted.peft_config[_ADAPTER].peft_type.value)
    try:
        with torch.no_grad():
            config, tensors = convert_to_lora(adapted, rank=keep * keep, adapter_name=_ADAPTER)  # the share of squares
            errors = _errors(adapted, tensors)
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise BadRequest(f"{kind} cannot be converted to LoRA by PEFT: {error}") from error
    if bad := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise BadRequest(f"{kind}: what it adds is not finite, or has no finite norm, at {', '.join(bad[:5])}")
    record = {"peft_type": kind, "keep": keep, "errors": errors}
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a folder beside it first, so that a failure leaves none by its name.
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
    """Return |D - B A| / |D| by layer, D being what the adapter adds; 0 where it adds nothing."""
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


def main() -> int:
    """Convert as the arguments say, and print the errors as JSON; return the exit code."""
    model, source, target, keep = sys.argv[1:]
    try:
        print(json.dumps(convert(model, Path(source), Path(target), float(keep))))
    except (LorafleetError, OSError) as error:
        print(error.message if isinstance(error, LorafleetError) else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
