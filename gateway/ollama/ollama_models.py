"""Base models and adapters as Ollama's models. Pure.

Fields that only GGUF files have, such as the number of parameters, are empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gateway.adapters.views import told_source
from gateway.ollama.ollama_parse import tagged_name
from gateway.ollama.ollama_write import time_text
from gateway.text.answer_parts import THOUGHTS
from gateway.text.tokenizer import ModelFiles
from protocol.wire import messages as m

FOREVER = "9999-12-31T23:59:59Z"
"""Expiry of models: they do not expire; an adapter stays until its memory is needed."""

Known = tuple[m.Alias, m.AdapterRecord]
"""A served adapter."""


def running(base: m.ServedModel, adapters: Iterable[Known], beats: Iterable[m.WorkerBeat]) -> list[dict[str, Any]]:
    """Return the models of `/api/ps`: the base if a worker has it, and adapters resident on a worker."""
    held = [beat.resident for beat in beats]
    resident = {digest for digests in held for digest in digests}
    shown: list[Known | None] = [None] if held else []
    shown += [known for known in adapters if known[0].digest in resident]
    return [
        {
            **{key: value for key, value in listed(base, known).items() if key != "modified_at"},
            "expires_at": FOREVER,
            "size_vram": _size(known) if base.device == "cuda" else 0,
            "context_length": _context(base, known),
        }
        for known in shown
    ]


def shown(base: m.ServedModel, known: Known | None, files: ModelFiles) -> dict[str, Any]:
    """Return the answer of `/api/show` for a base (known None) or an adapter. files: its own, or the base's."""
    kind = base.model_type
    source = f"FROM {base.name}\n" + (f"ADAPTER {told_source(known[0].source)}\n" if known is not None else "")
    return {
        "modelfile": source,
        "parameters": "\n".join(f'stop "{files.tokens.text_of(id_)}"' for id_ in sorted(files.eos_ids)),
        "template": files.template.source if files.template is not None else "",
        "details": _details(base, known),
        "model_info": {
            "general.architecture": kind,
            "general.basename": base.name,
            f"{kind}.context_length": _context(base, known),
            f"{kind}.vocab_size": base.vocab_size,
            **({f"{kind}.embedding_length": base.width} if base.width else {}),
            **(_adapter(known[1]) if known is not None else {}),
        },
        "capabilities": _capabilities(base, files),
        "modified_at": time_text(known[0].changed_ms or known[0].created_ms if known is not None else base.created_ms),
    }


def _context(base: m.ServedModel, known: Known | None) -> int:
    """Return the maximum tokens of prompt and output."""
    return base.max_model_len if known is None else base.less(known[1].num_virtual).max_model_len


def _adapter(record: m.AdapterRecord) -> dict[str, Any]:
    return {"adapter.type": str(record.config.get("peft_type", "LORA")).lower(), "adapter.rank": record.rank}


def _capabilities(base: m.ServedModel, files: ModelFiles) -> list[str]:
    if base.task != "generate":
        return ["embedding"] if base.task == "embed" else []
    source = files.template.source if files.template is not None else None
    thinks = source is not None and any(end in source for _, end in THOUGHTS)
    return ["completion", *(["tools"] if source is not None else []), *(["thinking"] if thinks else [])]


def listed(base: m.ServedModel, known: Known | None) -> dict[str, Any]:
    """Return the object of a base (known None) or an adapter in `/api/tags`."""
    name = tagged_name(base.name if known is None else known[0].name)
    changed_ms = base.created_ms if known is None else known[0].changed_ms or known[0].created_ms
    return {
        "name": name,
        "model": name,
        "modified_at": time_text(changed_ms),
        "size": _size(known),
        "digest": base.fingerprint if known is None else known[0].digest,
        "details": _details(base, known),
    }


def _size(known: Known | None) -> int:
    """Return an adapter's bytes; 0 for a base, whose size workers do not report."""
    return 0 if known is None else known[1].num_bytes


def _details(base: m.ServedModel, known: Known | None) -> dict[str, Any]:
    return {
        "parent_model": "" if known is None else tagged_name(base.name),
        "format": "safetensors",
        "family": base.model_type,
        "families": [base.model_type],
        "parameter_size": "",
        "quantization_level": base.dtype,
    }
