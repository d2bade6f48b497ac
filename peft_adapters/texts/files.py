"""The texts that an adapter may bring beside its weights: a chat template, special tokens, and added tokens.

The store keeps their significant content as one file. Its hash is a field of the adapter's config and therefore part of
its digest: the same weights with another template are another adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from peft_adapters.json_values import is_list, is_object
from peft_adapters.texts.tokenizer_json import OwnTokenizer
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel

TEXTS_FILE = "texts.json"
TEXTS_FIELD = "lorafleet_texts"
"""The config field with the file's SHA-256 (hex). The store sets it, whatever a source has there."""

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
TEXT_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", TEMPLATE)
"""The files that are read from a source, if present."""

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 128 << 10
MAX_CONFIG_BYTES = 4 << 20
"""Maximum bytes of any other text file. One that repeats all added tokens of a large vocabulary has 1.2 MB."""

_MAX_BYTES = {TOKENIZER: MAX_TOKENIZER_BYTES, TEMPLATE: MAX_TEMPLATE_BYTES}

MAX_TEXTS_BYTES = 8 << 20
"""Maximum bytes of the file that the store keeps; with the maximum of added tokens it has 5 MB."""

MAX_TEMPLATES = 64
MAX_SPECIAL_TOKENS = 64
MAX_TOKEN_CHARS = 1_024


class OwnTexts(msgspec.Struct, forbid_unknown_fields=True):
    """The significant content of an adapter's text files."""

    template: str | None = None
    special_tokens: dict[str, str] = {}  # by the names that templates use, such as "eos_token"
    tokenizer: OwnTokenizer | None = None

    def check(self) -> None:
        """Raise AdapterRefused if a limit for adapters is exceeded."""
        _check_size(TEMPLATE, len((self.template or "").encode()))
        num = len(self.special_tokens)
        if num > MAX_SPECIAL_TOKENS:
            raise AdapterRefused([f"special_tokens_map.json has {num} tokens; the limit is {MAX_SPECIAL_TOKENS}"])
        for name, token in self.special_tokens.items():
            if max(len(name), len(token)) > MAX_TOKEN_CHARS:
                raise AdapterRefused([f"{name:.80} has {len(token)} characters; the limit is {MAX_TOKEN_CHARS}"])
        if self.tokenizer is not None:
            self.tokenizer.check()

    def check_base(self, base: ServedModel) -> None:
        """Raise AdapterRefused if the adapter's tokenizer does not match the base's."""
        if self.tokenizer is not None:
            self.tokenizer.check_base(base.tokenizer)


def read_texts(files: Mapping[str, bytes]) -> OwnTexts | None:
    """Return the significant content of an adapter's text files, given by name; None without tokenizer or template.

    Raises AdapterRefused for a file that is not UTF-8, is too large, or has content that adapters may not bring.
    """
    texts: dict[str, str] = {}
    for name in TEXT_FILES:
        if name in files:
            _check_size(name, len(files[name]))
            try:
                texts[name] = files[name].decode()
            except UnicodeDecodeError as error:
                raise AdapterRefused([f"{name} cannot be read: {error}"]) from error
    source = _config(texts, "tokenizer_config.json").get("chat_template")
    if is_list(source) and len(source) > MAX_TEMPLATES:
        raise AdapterRefused([f"tokenizer_config.json has {len(source)} templates; the limit is {MAX_TEMPLATES}"])
    found = OwnTexts(template_of(texts), special_tokens(texts))
    found.check()
    if TOKENIZER in texts:
        found.tokenizer = OwnTokenizer.read(texts[TOKENIZER])
    elif not found.template:
        return None
    return found


def parse_texts(raw: bytes, digest: str) -> OwnTexts:
    """Return the texts in the file that a store keeps for an adapter.

    Raises AdapterRefused unless the SHA-256 (hex) is `digest` and the content is allowed for adapters.
    """
    if len(raw) > MAX_TEXTS_BYTES:
        raise AdapterRefused([f"{TEXTS_FILE} has {len(raw)} bytes; the limit is {MAX_TEXTS_BYTES}"])
    if hashlib.sha256(raw).hexdigest() != digest:
        raise AdapterRefused([f"{TEXTS_FILE} has another hash"])
    try:
        texts = msgspec.json.decode(raw, type=OwnTexts)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise AdapterRefused([f"{TEXTS_FILE} cannot be read: {error}"]) from error
    texts.check()
    return texts


def max_bytes(name: str) -> int:
    """Return the maximum size of a text file of this name, in bytes."""
    return _MAX_BYTES.get(name, MAX_CONFIG_BYTES)


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > max_bytes(name):
        raise AdapterRefused([f"{name} has {num_bytes} bytes; the limit is {max_bytes(name)}"])


def template_of(texts: Mapping[str, str]) -> str | None:
    """Return the chat template among text files, None if there is none; the default one if there are several."""
    if TEMPLATE in texts:
        return texts[TEMPLATE]
    source = _config(texts, "tokenizer_config.json").get("chat_template")
    if is_list(source):
        named = [entry.get("template") for entry in source if is_object(entry) and entry.get("name") == "default"]
        source = named[-1] if named else None
    return source if isinstance(source, str) else None


def _config(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return a text file as a JSON object, {} if it is missing. Raises AdapterRefused if it is not an object."""
    try:
        return msgspec.json.decode(texts.get(name, "{}"), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise AdapterRefused([f"{name} cannot be read: {error}"]) from error
    except RecursionError as error:
        raise AdapterRefused([f"{name} cannot be read: it is nested too deeply"]) from error


def special_tokens(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of special tokens, by the names that templates use, such as "eos_token"."""
    older = _config(texts, "special_tokens_map.json")
    tokens: dict[str, str] = {}
    for name, value in {**older, **_config(texts, "tokenizer_config.json")}.items():
        text = value.get("content") if is_object(value) else value
        if isinstance(text, str) and (name in _SPECIAL_TOKENS or (name.endswith("_token") and name in older)):
            tokens[name] = text
    return tokens


_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
