"""The tokenizer and chat template of a model or an adapter. Encoding runs in threads: the library frees the GIL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gateway.text.answer_parts import THOUGHTS
from gateway.text.chat import ChatTemplate, normalize_messages
from gateway.text.sandbox import SandboxedTemplate
from gateway.tools.prompt import explain_tools, knows_tools
from peft_adapters.texts import TEXT_FILES, TOKENIZER
from protocol.runtime.model_files import TOKENIZER_FILES, model_folder, served_name
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

UNKNOWN_CHARACTERS = 256
"""Characters that one token stands for at most, whatever the vocabulary has: unknown words are one token each."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A conversation as tokens."""

    ids: list[int]
    opened: bool  # it ends with the beginning of the model's reasoning


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The base model's tokenizer, chat template and end tokens, or those that an adapter brings."""

    name: str  # served name of the base
    tokenizer: Tokenizer
    token_text: TokenText
    template: ChatTemplate | SandboxedTemplate | None
    eos_ids: frozenset[int]
    texts: Mapping[str, str]  # the files that these were read from, by name

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens that the tokenizer puts around it."""

        def encode() -> list[list[int]]:
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]

        return await asyncio.to_thread(encode)

    async def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, variables: dict[str, Any],
        tenant: str, tools: list[dict[str, Any]] | None = None, check: Callable[[str], object] | None = None,
    ) -> EncodedChat:  # fmt: skip
        """Return the tokens of a conversation. tenant: who has the sandbox render it, where it must.

        `check` is shown the rendered text before it is tokenized.
        Raises BadRequest when it cannot be rendered, Overloaded and Unavailable when the sandbox has no place, and what
        `check` does.
        """
        template = self.template
        if template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", code="no_chat_template")

        normal = normalize_messages(messages)
        if tools and not knows_tools(template.source):
            normal = explain_tools(normal, tools)
        elif tools:
            variables = {"tools": tools, **variables}
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "variables": variables}
        if isinstance(template, SandboxedTemplate):
            text = await template.render(normal, **options, tenant=tenant)
            return await asyncio.to_thread(self._encode_rendered, text, check)

        def encode() -> EncodedChat:
            return self._encode_rendered(template.render(normal, **options), check)

        return await asyncio.to_thread(encode)

    def _encode_rendered(self, text: str, check: Callable[[str], object] | None) -> EncodedChat:
        if check is not None:
            check(text)
        # The template has written the special tokens itself.
        ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return EncodedChat(ids, opened=text.rstrip().endswith(tuple(begin for begin, _ in THOUGHTS)))


def load_model_files(settings: Settings) -> ModelFiles:
    """Read tokenizer, chat template and end tokens of `settings.model`. Blocks; raises BadRequest if it is no model."""
    folder = model_folder(settings.model, TOKENIZER_FILES)
    texts = {name: (folder / name).read_text() for name in TEXT_FILES if (folder / name).is_file()}
    if TOKENIZER not in texts:
        raise BadRequest(f"{folder} has no {TOKENIZER}")
    tokenizer, token_text = read_tokenizer(texts[TOKENIZER])
    return ModelFiles(
        name=served_name(settings.model, settings.served_name),
        tokenizer=tokenizer,
        token_text=token_text,
        template=ChatTemplate.of(texts),
        eos_ids=_eos_ids(folder),
        texts=texts,
    )


def read_tokenizer(text: str) -> tuple[Tokenizer, TokenText]:
    """Return the tokenizer of a tokenizer.json. Raises BadRequest."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain exceptions
        raise BadRequest(f"{TOKENIZER} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, TokenText(tokenizer)


def _eos_ids(folder: Path) -> frozenset[int]:
    """Return the ids that end a text: of the generation config and of the model config, as the worker does."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        for source in (config, config.get("text_config") or {}):
            ids = source.get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)


class TokenText:
    """The bytes and the printable form of single tokens, for logprobs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        self._special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.longest = max(UNKNOWN_CHARACTERS, *map(len, tokenizer.get_vocab()))
        """Most characters of a token: a text cannot have fewer tokens than it has of these."""
        self._byte_level = _has_byte_level(json.loads(tokenizer.to_str()).get("decoder"))
        self.bytes = lru_cache(maxsize=1 << 16)(self._bytes)
        self.text = lru_cache(maxsize=1 << 16)(self._text)

    def is_added(self, id_: int) -> bool:
        """Return whether a token was added to the vocabulary as a whole, as markers are."""
        return id_ in self._added

    def is_special(self, id_: int) -> bool:
        """Return whether a token is a special one, which is no part of the text."""
        return id_ in self._special

    def _bytes(self, id_: int) -> bytes:
        """Return a token's UTF-8 bytes, which may be only a part of a character."""
        token = self._tokenizer.id_to_token(id_)
        if token is None:
            return b""
        if id_ in self._special:
            return token.encode()
        if self._byte_level:
            values = [_BYTE_OF_CHARACTER.get(character) for character in token]
            # An added token is stored as it is written, not in the byte alphabet.
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def _text(self, id_: int) -> str:
        r"""Return a token as text; `bytes:\xe2\x80`, as OpenAI does, if it is not valid UTF-8 alone."""
        raw = self.bytes(id_)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)


def _has_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(_has_byte_level(inner) for inner in decoder.get("decoders", []))


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level BPE's alphabet stands for.

    Printable Latin-1 characters stand for themselves, the other 68 bytes are moved to U+0100 and up, in order.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [value for value in range(256) if value not in kept]
    return {chr(value): value for value in kept} | {chr(0x100 + i): value for i, value in enumerate(moved)}


_BYTE_OF_CHARACTER = _byte_alphabet()
