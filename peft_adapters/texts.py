"""The texts an adapter may bring beside its weights: a tokenizer and a chat template of its own.

The store keeps them as one file, whose hash is a field of the adapter's config and so part of its digest: the same
weights with another template are another adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from peft_adapters.json_values import is_list, is_object
from protocol.wire.errors import AdapterRefused

TEXTS_FILE = "texts.json"
TEXTS_FIELD = "lorafleet_texts"
"""The config's field with the file's sha256 (hex). The store writes it, whatever a source has there."""

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
TEXT_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", TEMPLATE)
"""The files that are taken from a source, where it has them."""

MAX_TEXT_BYTES = 64 << 20


def join_texts(files: Mapping[str, bytes]) -> bytes:
    """Return an adapter's text files, by name, as one file; b"" if neither tokenizer nor template is among them.

    Raises AdapterRefused for a file that is not UTF-8, is too large, or should be a JSON object and is not.
    """
    texts: dict[str, str] = {}
    for name in TEXT_FILES:
        if name in files:
            if len(files[name]) > MAX_TEXT_BYTES:
                raise AdapterRefused([f"{name} has {len(files[name])} bytes; the limit is {MAX_TEXT_BYTES}"])
            try:
                texts[name] = files[name].decode()
                if name.endswith(".json"):
                    msgspec.json.decode(texts[name], type=dict[str, Any])
            except (UnicodeDecodeError, msgspec.MsgspecError) as error:
                raise AdapterRefused([f"{name} cannot be read: {error}"]) from error
    if TOKENIZER not in texts and not template_of(texts):
        return b""
    return msgspec.json.encode(texts)


def split_texts(raw: bytes, digest: str) -> dict[str, str]:
    """Return the text files in a stored file, by name. Raises AdapterRefused if its sha256 (hex) is not `digest`."""
    if hashlib.sha256(raw).hexdigest() != digest:
        raise AdapterRefused([f"{TEXTS_FILE} has another hash"])
    return msgspec.json.decode(raw, type=dict[str, str])


def template_of(texts: Mapping[str, str]) -> str | None:
    """Return the chat template among text files, None if there is none; of several named ones the default."""
    if TEMPLATE in texts:
        return texts[TEMPLATE]
    source = tokenizer_config(texts).get("chat_template")
    if is_list(source):
        named = {entry.get("name"): entry.get("template") for entry in source if is_object(entry)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def tokenizer_config(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the parsed tokenizer_config.json, {} if there is none."""
    return msgspec.json.decode(texts.get("tokenizer_config.json", "{}"), type=dict[str, Any])


def special_tokens(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of special tokens by the names that templates use, such as "eos_token"."""
    older = msgspec.json.decode(texts.get("special_tokens_map.json", "{}"), type=dict[str, Any])
    tokens: dict[str, str] = {}
    for name, value in {**older, **tokenizer_config(texts)}.items():
        text = value.get("content") if is_object(value) else value
        if isinstance(text, str) and (name in _SPECIAL_TOKENS or (name.endswith("_token") and name in older)):
            tokens[name] = text
    return tokens


_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
