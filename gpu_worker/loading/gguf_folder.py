"""`python -m gpu_worker.loading.gguf_folder FILE FOLDER` creates the folder from which a GGUF model is served.

It contains config, tokenizer and chat template as transformers reads them from the file, an index of the tensors, and a
link to the file. No weights are read.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from gpu_worker.loading.checkpoint import UNREADABLE, one_line
from gpu_worker.quantised.index import DTYPES, Entry, Index, write_index
from gpu_worker.quantised.modules import parameters_on_meta
from lora_kernels.quantised import KINDS
from protocol.runtime.model_files import GGUF_LINK
from protocol.wire.errors import BadRequest

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How llama.cpp stores an architecture's weights differently from transformers."""

    interleaves: bool = False  # interleaves the halves of query and key heads
    adds_one: bool = False  # adds 1 to norm weights


ARCHITECTURES = {
    "llama": GgufArchitecture(interleaves=True),
    "qwen2": GgufArchitecture(),
    "qwen3": GgufArchitecture(),
    "gemma2": GgufArchitecture(adds_one=True),
    "gemma3": GgufArchitecture(adds_one=True),
}
"""The supported GGUF architectures, by `general.architecture`."""


def make_folder(file: Path, folder: Path) -> None:
    """Create the folder of a GGUF model, atomically. Raises BadRequest for an unsupported file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise BadRequest("GGUF files are read with the package gguf: pip install 'lorafleet[demo]'") from error
    try:
        reader: Any = GGUFReader(file)
    except UNREADABLE as error:
        raise BadRequest(f"{file} is not a readable GGUF file: {one_line(error)}") from error
    name = _text(reader, "general.architecture")
    if name not in ARCHITECTURES:
        raise BadRequest(f"{file} is of the architecture {name!r}; of GGUF files {', '.join(ARCHITECTURES)} are served")
    try:
        config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the tokenizers library raises no more specific type
        raise BadRequest(f"transformers cannot read {file}: {one_line(error)}") from error
    head_dim = reader.fields.get(f"{name}.attention.key_length")
    if head_dim is not None and hasattr(config, "head_dim"):
        config.head_dim = int(head_dim.contents())
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config)
    index = index_of(reader, model, ARCHITECTURES[name])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        config.architectures = [type(model).__name__]
        config.save_pretrained(made)
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.save_pretrained(made)
        write_index(made, index)
        (made / GGUF_LINK).symlink_to(file.resolve())
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def index_of(reader: Any, model: PreTrainedModel, architecture: GgufArchitecture) -> Index:
    """Return the offsets of a model's tensors in its file. Raises BadRequest for unsupported tensors."""
    names: dict[str, str] = get_gguf_hf_weights_map(model, TensorProcessor())
    entries: dict[str, Entry] = {}
    reasons: list[str] = []
    has_factors = False
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name.lower()
        shape = tuple(int(size) for size in reversed(tensor.shape))
        entry_of: dict[str, Any] = {"kind": kind, "shape": shape, "offset": int(tensor.data_offset)}
        if kind not in KINDS and kind not in DTYPES:
            reasons.append(f"{tensor.name} of type {kind.upper()}")
        elif tensor.name == ROPE_FACTORS:
            has_factors = True
            entries[ROPE_FACTORS] = Entry(**entry_of)
        elif tensor.name not in names:
            reasons.append(f"{tensor.name}, which transformers' {model.config.model_type} lacks")
        else:
            heads = _heads(tensor.name, model.config) if architecture.interleaves else 0
            one = architecture.adds_one and "norm" in tensor.name
            entries[names[tensor.name]] = Entry(**entry_of, heads=heads, minus_one=one)
    if reasons:
        shown = "; ".join(reasons[:3]) + (" …" if len(reasons) > 3 else "")
        served = ", ".join(kind.upper() for kind in (*KINDS, *DTYPES))
        raise BadRequest(f"the file has {len(reasons)} tensors that are not served: {shown}. Types served: {served}")
    return Index(GGUF_LINK, entries, ROPE_FACTORS if has_factors else "")


def _heads(name: str, config: PreTrainedConfig) -> int:
    """Return the number of heads whose halves a tensor interleaves, 0 if it has transformers' order."""
    text: Any = config.get_text_config()
    return text.num_attention_heads if ".attn_q." in name else text.num_key_value_heads if ".attn_k." in name else 0


def _text(reader: Any, field: str) -> str:
    found = reader.fields.get(field)
    return str(found.contents()) if found is not None else ""


def main() -> int:
    """Create the folder named on the command line; return the exit code."""
    try:
        make_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    except (BadRequest, OSError) as error:
        print(error.message if isinstance(error, BadRequest) else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
