"""Small tokenizers with the components of every tokenizer family in transformers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "▁", "▁a", "▁▁b", "a", "b", "##b", "##", "ab", "é", "漢", "😀", "Ġa", "Ġ", " ", "  ", "a b", "<0xE6>", "<0xBC>",
    "<0xA2>", "<0x41>", "<0xFF>", "<0x+f>", "<0xgg>", "n't", "do", "not", "'", "'s", "'re", ".", "?", "a</w>",
    "</w>b</w>", "{", '"', ":", "}", "▁{", "▁:", "▁x", "x",
]  # fmt: skip
SPECIAL = ["<s>", "</s>", "<unk>"]

DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def model(kind: str) -> dict[str, Any]:
    """Return a tokenizer model of a kind, with every byte and `WORDS` as tokens."""
    names = [*SPECIAL, *dict.fromkeys([*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet())])]
    ids = {name: i for i, name in enumerate(names)}
    return {
        "BPE": {"type": "BPE", "vocab": ids, "merges": [["a", "b"]], "unk_token": "<unk>"},
        "Unigram": {"type": "Unigram", "vocab": [[name, -1.0 - i / 10] for name, i in ids.items()], "unk_id": 2},
        "WordPiece": {
            "type": "WordPiece", "vocab": ids, "unk_token": "<unk>", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        "WordLevel": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
    }[kind]  # fmt: skip


def added(content: str, id_: int = 0, *, special: bool = False) -> dict[str, Any]:
    """Return the entry of an added token."""
    return {
        "id": id_, "content": content, "special": special, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False,
    }  # fmt: skip


def tokenizer_file(kind: str = "BPE", **parts: Any) -> dict[str, Any]:
    """Return a tokenizer.json as an object. parts: components to set; the others are None."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": model(kind),
        "added_tokens": [*(added(name, special=True) for name in (*SPECIAL, "<|end|>")), added("zebra ▁")],
        **parts,
    }  # fmt: skip


def _splits(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def _of_transformers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, tokenizer.json) of every tokenizer that transformers can construct without files."""
    root = Path(str(transformers.__file__)).parent
    for path in sorted(root.glob("models/*/tokenization_*.py")):
        kinds: dict[str, Any] = {}
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        with suppress(ImportError, NameError):  # a package is missing
            kinds = vars(importlib.import_module(module))
        for name, kind in kinds.items():
            if isinstance(kind, type) and kind.__module__ == module and issubclass(kind, PreTrainedTokenizerFast):
                with suppress(ImportError, TypeError, ValueError):  # it needs a vocabulary
                    yield name, json.loads(kind().backend_tokenizer.to_str())


@cache
def families() -> dict[str, dict[str, Any]]:
    """Return tokenizer.json objects by family: the components of each around `model`."""
    found: dict[str, dict[str, Any]] = {}
    for name, file in _of_transformers():
        parts = {part: file[part] for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
        found[name] = tokenizer_file(file["model"]["type"], **parts)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for name, regex in {"Llama-3": LLAMA_3, "Llama-4": LLAMA_4, "DeepSeek": DEEPSEEK, "Bloom": BLOOM}.items():
        found[name] = tokenizer_file(pre_tokenizer=_splits(regex), decoder=byte_level)
    found["Llama-2, older"] = tokenizer_file(
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    found["T5, older"] = tokenizer_file("Unigram", pre_tokenizer=older, decoder=older)
    found["words"] = tokenizer_file("WordLevel", pre_tokenizer={"type": "Whitespace"})
    return found
