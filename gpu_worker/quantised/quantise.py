"""Quantizes a Hub folder once, and stores the result: a folder of blocks that later starts map.

int8 is Q8_0; int4 is Q4_0 with the head in Q8_0; both round to nearest. Quantized are linear layers whose input width
is a multiple of the block size, and fused experts whose output width is one of a panel's columns, too.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gpu_worker.quantised.expert_blocks import fitting_parameters
from gpu_worker.quantised.hub_tensors import HubTensors
from gpu_worker.quantised.index import ALIGNMENT, DTYPES, FORMAT, Entry, Index, write_index
from gpu_worker.quantised.modules import parameters_on_meta
from lora_kernels.quantised import block_inputs, quantise
from protocol.runtime.model_files import TOKENIZER_FILES, cache_folder, prune_folders
from protocol.runtime.private_files import is_own
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

WEIGHTS = "weights.bin"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def quantised_folder(
    folder: Path, config: PreTrainedConfig, quantization: Literal["int8", "int4"], num_kept: int
) -> Path:
    """Return the folder of a model's weights in blocks, created atomically if missing.

    num_kept: number of such folders kept after one was created. Raises BadRequest for a model that is not a plain
    causal LM in safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadRequest(f"quantization is {quantization}, but {folder} has no safetensors to quantise")
    root = cache_folder() / "quantised"
    made = root / _key(folder, files, quantization)
    if is_own(made) and (made / "config.json").is_file():
        made.touch()
        return made
    started = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        new = Path(scratch) / "made"
        new.mkdir()
        for pattern in TOKENIZER_FILES:
            for path in folder.glob(pattern):
                if path.is_file() and not path.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(path, new / path.name)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config)
        with (new / WEIGHTS).open("wb") as out:
            entries = _write_weights(out, model, files, quantization)
        write_index(new, Index(WEIGHTS, entries))
        shutil.rmtree(made, ignore_errors=True)
        new.rename(made)
    logger.info("%s quantised to %s in %.1f s", folder, quantization, time.monotonic() - started)
    prune_folders(root, num_kept)  # existing mappings of a deleted folder stay valid
    return made


def _key(folder: Path, files: list[Path], quantization: str) -> str:
    """Return the cache name of a quantized folder: a hash of its files, their sizes and times, and the quantization.

    A file in the Hub's cache is a link to a file named by its content.
    """
    stamps = [
        (path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in [*files, folder / "config.json"]
    ]
    return hashlib.sha256(repr((FORMAT, quantization, [(str(p), *rest) for p, *rest in stamps])).encode()).hexdigest()[
        :24
    ]


def _write_weights(out: BinaryIO, model: PreTrainedModel, files: list[Path], quantization: str) -> dict[str, Entry]:
    """Write all tensors of a model. Return their entries. Raises BadRequest if the files lack one."""
    tensors = HubTensors(model, files)
    head: Any = model.get_output_embeddings()
    linears = {f"{name}.weight": module for name, module in model.named_modules() if type(module) is nn.Linear}
    embedding = model.get_input_embeddings()
    embedded = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
    modules = model.named_modules()
    experts = {f"{name}.{own}" for name, module in modules for own in fitting_parameters(module)}
    entries: dict[str, Entry] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        linear = linears.get(name)
        source = embedded if linear is not None and linear is head and name not in tensors else name
        if source not in tensors:
            raise BadRequest(f"quantization is {quantization}, but the weights lack {source} under transformers' name")
        kind = "q8_0" if quantization == "int8" or (linear is not None and linear is head) else "q4_0"
        if name in experts:
            entries[name] = _append_experts(out, kind, tensors.experts(name), tuple(parameter.shape))
            continue
        weight = tensors.tensor(source)
        if linear is None or weight.shape[1] % block_inputs("q8_0"):
            if weight.dtype not in _NAMES:
                raise BadRequest(f"quantization is {quantization}, but {source} is of {weight.dtype}")
            entries[name] = _append(out, _NAMES[weight.dtype], weight.contiguous(), tuple(weight.shape))
            continue
        made = quantise(weight, kind)
        entries[name] = _append(out, made.kind, made.rows, tuple(weight.shape))
    return entries


def _append(out: BinaryIO, kind: Any, tensor: Tensor, shape: tuple[int, ...]) -> Entry:
    offset = _align(out)
    _write(out, tensor)
    return Entry(kind, shape, offset)


def _append_experts(
    out: BinaryIO, kind: Literal["q8_0", "q4_0"], experts: Iterator[Tensor], shape: tuple[int, ...]
) -> Entry:
    """Quantize experts [E, N, K] one after the other. Raises BadRequest if they are not of `shape`."""
    offset, num = _align(out), 0
    for num, expert in enumerate(experts, 1):
        if num > shape[0] or tuple(expert.shape) != shape[1:]:
            raise BadRequest(f"expert {num - 1} has the shape {[*expert.shape]}; the model has experts {[*shape]}")
        _write(out, quantise(expert, kind).rows)
    if num != shape[0]:
        raise BadRequest(f"the weights have {num} experts; the model has experts {[*shape]}")
    return Entry(kind, shape, offset)


def _align(out: BinaryIO) -> int:
    offset = -(-out.tell() // ALIGNMENT) * ALIGNMENT
    return out.seek(offset)


def _write(out: BinaryIO, tensor: Tensor) -> None:
    tensor.reshape(-1).view(torch.uint8).numpy().tofile(out)
