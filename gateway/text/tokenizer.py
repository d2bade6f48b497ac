"""The tokenizer and chat template of a base model or an adapter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer

from gateway.chat.message_text import Message, text_of
from gateway.chat.messages import check_roles, normalize_messages
from gateway.chat.template import ChatTemplate
from gateway.sandbox.sandbox import SandboxedTemplate
from gateway.text.answer_parts import THOUGHTS
from gateway.tools.prompt import explain_tools, knows_tools, without_calls
from peft_adapters.texts.files import TEXT_FILES, TOKENIZER, special_tokens
from peft_adapters.texts.tokenizer_json import AddedToken, BaseTokens
from protocol.runtime.model_files import TOKENIZER_FILES, model_folder, served_name
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import AdapterRefused, BadRequest, LorafleetError, panics_as
from protocol.wire.tokens import TokenTable


class Encoding(NamedTuple):
    """A tokenized text with details of each token."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]]  # [start, end) of each in the text, in characters
    special: Sequence[int]  # 1 for a special token, else 0
    tokens: Sequence[str]


Pair = tuple[str, str]
"""Two texts, such as a query and a document."""

PAIR_ROLES = ("query", "document")
"""The roles of a pair's texts in a chat template, as in sentence-transformers and vLLM."""


class EncodedPair(NamedTuple):
    """A tokenized pair of texts."""

    ids: list[int]
    second: int = 0  # index of the first token of type 1; 0: none


class Encoder:
    """A tokenizer: the base model's, possibly with an adapter's added tokens.

    Its methods run in threads, where the library releases the GIL.
    """

    def __init__(self, tokenizer: Tokenizer, num_bytes: int = 0) -> None:
        """num_bytes: memory in addition to the base's."""
        self._tokenizer = tokenizer
        self.num_bytes = num_bytes

    def id_of(self, token: str) -> int | None:
        """Return a token's id, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def with_added(self, added: Sequence[AddedToken]) -> Encoder:
        """Return an encoder with these added tokens in place of its own; all else is shared. Blocks.

        added: tokens accepted by `BaseTokens.with_added`. Raises AdapterRefused if the library assigns other ids.
        """
        base = self._tokenizer
        made = Tokenizer(base.model)
        made.normalizer, made.pre_tokenizer = base.normalizer, base.pre_tokenizer
        made.post_processor, made.decoder = base.post_processor, base.decoder
        try:
            with panics_as(lambda text: AdapterRefused([text])):
                made.add_tokens([_as_library(token) for token in added])
        except LorafleetError:
            raise
        except Exception as error:  # the library raises plain exceptions
            raise AdapterRefused([f"{TOKENIZER}: its added tokens cannot be looked for: {error}"]) from error
        for token in added:
            if made.token_to_id(token.content) != token.id:
                raise AdapterRefused([f"{TOKENIZER}: the added token {brief(token.content, 80)} would have another id"])
        return Encoder(made, sum(TOKEN_BYTES + CHARACTER_BYTES * len(token.content) for token in added))

    def ids(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of each text. Blocks."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of each text."""
        return await asyncio.to_thread(self.ids, texts, add_special_tokens=add_special_tokens)

    async def detailed(
        self, texts: Sequence[str], *, add_special_tokens: bool, check: Callable[[int], object]
    ) -> list[Encoding]:
        """Return the tokens of each text with their details.

        check: raises if given a number of tokens that is too large, before lists are made of them.
        """

        def encode() -> list[Encoding]:
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            for encoding in found:
                check(len(encoding))
            return [Encoding(e.ids, e.offsets, e.special_tokens_mask, e.tokens) for e in found]

        return await asyncio.to_thread(encode)

    async def shortened(self, texts: Sequence[str], most: int) -> list[str]:
        """Return the beginning of each text, cut after `most` tokens."""

        def cut() -> list[str]:
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            shown: list[str] = []
            for text, encoding in zip(texts, found, strict=True):
                is_long = len(encoding) > most
                if is_long:
                    encoding.truncate(most)
                shown.append(text[: encoding.offsets[-1][1]] if is_long else text)
            return shown

        return await asyncio.to_thread(cut)

    async def pairs(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Return the ids of each pair, and the index where its second text begins."""

        def encode() -> list[EncodedPair]:
            found = self._tokenizer.encode_batch(list(pairs), add_special_tokens=True)
            return [EncodedPair(e.ids, _second_of(e.type_ids)) for e in found]

        return await asyncio.to_thread(encode)


def _as_library(token: AddedToken) -> LibraryToken:
    return LibraryToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _second_of(types: Sequence[int]) -> int:
    """Return the index from which on all token types are 1; 0 if there is none, or if other types follow."""
    second = len(types) - sum(types)
    return second if 0 < second < len(types) and types[second] == 1 else 0


TOKEN_BYTES, CHARACTER_BYTES = 1000, 100
"""Memory that the library uses per added token and per character of it: measured, rounded up."""

MAX_RENDERED_CHARS = 4 << 20
"""Maximum characters rendered by an adapter's template; requests are limited to as many."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A tokenized conversation."""

    ids: list[int]
    opened: bool  # it ends within reasoning
    continued: bool = False  # it ends within an answer's text


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The tokenizer, chat template and end tokens of a base model, possibly changed by an adapter's files."""

    name: str  # served name of the base
    encoder: Encoder
    tokens: TokenTable
    template: ChatTemplate | SandboxedTemplate | None
    eos_ids: frozenset[int]
    texts: Mapping[str, str]  # the base model's text files, by name
    pair_template: ChatTemplate | None = None  # from the settings; renders pairs of texts to prompts
    base_tokens: BaseTokens | None = None  # source of `tokens`; None in an adapter's files
    tokenizer: str = ""  # hash of the base's tokenizer.json
    own_ends: frozenset[int] = frozenset()  # end tokens that the base lacks, so workers do not know them

    @property
    def template_of_pairs(self) -> ChatTemplate | SandboxedTemplate | None:
        """The template that renders pairs: the settings', else the model's own if it has the roles of pairs.

        None if there is neither.
        """
        own = self.template
        if self.pair_template is not None or own is None:
            return self.pair_template
        return own if all(role in own.source for role in PAIR_ROLES) else None

    async def encode_pairs(self, pairs: Sequence[Pair], *, tenant: str) -> list[EncodedPair]:
        """Return the tokens of pairs of texts, as rendered by a template or joined by the tokenizer.

        tenant: whose turn in the sandbox it takes, if one is needed. Raises as `encode_chat`.
        """
        template = self.template_of_pairs
        if template is None:
            return await self.encoder.pairs(pairs)
        options: dict[str, Any] = {"add_generation_prompt": True, "variables": {}}
        messages = [[{"role": "query", "content": a}, {"role": "document", "content": b}] for a, b in pairs]
        if isinstance(template, SandboxedTemplate):
            texts = [await template.render(pair, **options, continue_final=False, tenant=tenant) for pair in messages]
            num = sum(map(len, texts))
            if num > MAX_RENDERED_CHARS:
                message = f"the adapter's chat template makes {num} characters of the pairs"
                raise BadRequest(f"{message}; the limit is {MAX_RENDERED_CHARS}")
        else:
            texts = await asyncio.to_thread(lambda: [template.render(pair, **options) for pair in messages])
        ids = await self.encoder.encode(texts, add_special_tokens=False)
        return [EncodedPair(one) for one in ids]

    async def encode_chat(
        self, messages: list[Message], *, add_generation_prompt: bool, continue_final: bool = False,
        variables: dict[str, Any], tenant: str, tools: list[dict[str, Any]] | None = None,
        check: Callable[[str], object] | None = None, add_special_tokens: bool = False,
    ) -> EncodedChat:  # fmt: skip
        """Return the tokens of a conversation. tenant: whose turn in the sandbox it takes, if one is needed.

        continue_final: the answer continues the last message, the assistant's. add_special_tokens: besides the
        template's own. check: called with the rendered text before it is tokenized; may raise. Raises BadRequest if the
        conversation cannot be rendered, Overloaded and Unavailable if the sandbox is full.
        """
        template, encoder = self.template, self.encoder
        if template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", code="no_chat_template")

        def prepare() -> tuple[list[Message], str | None, dict[str, Any]]:
            """Return the messages in the template's form, the last one's continued text, and rendering options."""
            normal = normalize_messages(messages)
            final = _continued(normal) if continue_final else None
            if "tool_calls" not in template.source:
                normal = without_calls(normal)
            if tools and not knows_tools(template.source):
                normal = explain_tools(without_calls(normal), tools)
            more = {"tools": tools, **variables} if tools and knows_tools(template.source) else variables
            begin = {"add_generation_prompt": add_generation_prompt, "continue_final": continue_final}
            return normal, final, {**begin, "variables": more}

        def render_and_encode() -> EncodedChat:
            assert isinstance(template, ChatTemplate)
            normal, final, options = prepare()
            text = template.render(normal, **options)
            check_roles(normal, text)
            if check is not None:
                check(text)
            return _chat(text, encoder.ids([text], add_special_tokens=add_special_tokens), final)

        if isinstance(template, ChatTemplate):
            return await asyncio.to_thread(render_and_encode)
        normal, final, options = await asyncio.to_thread(prepare)
        text = await template.render(normal, **options, tenant=tenant)
        if len(text) > MAX_RENDERED_CHARS:
            raise BadRequest(
                f"the adapter's chat template makes {len(text)} characters; the limit is {MAX_RENDERED_CHARS}",
                param="messages",
            )
        await asyncio.to_thread(check_roles, normal, text)
        if check is not None:
            check(text)
        ids = await encoder.encode([text], add_special_tokens=add_special_tokens)
        return _chat(text, ids, final)


def _continued(messages: Sequence[Message]) -> str:
    """Return the text of the last message, which is to be continued. Raises BadRequest if there is none."""
    last, content = messages[-1], messages[-1].get("content", [])
    if last["role"] != "assistant" or content == [] or "tool_calls" in last:
        message = "continue_final_message: the last message must be the assistant's, with content and no tool calls"
        raise BadRequest(message, param="continue_final_message")
    return text_of(content)


def _chat(text: str, ids: list[list[int]], final: str | None) -> EncodedChat:
    """Return a rendered conversation as tokens; the template has written the special tokens.

    final: text at its end that is to be continued, None if there is none.
    """
    opened = text.rstrip().endswith(tuple(begin for begin, _ in THOUGHTS))
    if final is not None:
        opened = opened or any(final.rfind(begin) > final.rfind(end) for begin, end in THOUGHTS)
    return EncodedChat(ids[0], opened, continued=bool(final and final.strip()) and not opened)


def load_model_files(settings: Settings) -> ModelFiles:
    """Read tokenizer, chat template and end tokens of `settings.model`. Blocks.

    Raises BadRequest if they are invalid.
    """
    folder = model_folder(settings.model, TOKENIZER_FILES)
    try:
        return _model_files(settings, folder)
    except AdapterRefused as error:  # from checks shared with adapters' files
        raise BadRequest(f"{folder}: {error.message}") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # not UTF-8, not JSON, or of another form
        raise BadRequest(f"the text files in {folder} cannot be read: {brief(error, 300)}") from error


def _model_files(settings: Settings, folder: Path) -> ModelFiles:
    texts = {name: (folder / name).read_text() for name in TEXT_FILES if (folder / name).is_file()}
    if TOKENIZER not in texts:
        raise BadRequest(f"{folder} has no {TOKENIZER}")
    tokens = BaseTokens(texts[TOKENIZER])
    return ModelFiles(
        name=served_name(settings.model, settings.served_name),
        encoder=Encoder(_read_tokenizer(texts[TOKENIZER])),
        tokens=tokens.table,
        template=ChatTemplate.of(texts),
        pair_template=_pair_template(settings, texts),
        eos_ids=_eos_ids(folder),
        texts=texts,
        base_tokens=tokens,
        tokenizer=tokens.table.key,
    )


def _pair_template(settings: Settings, texts: Mapping[str, str]) -> ChatTemplate | None:
    """Return the template for pairs from the settings. Raises BadRequest if its file is invalid."""
    path = settings.pair_template
    if path is None:
        return None
    try:
        source = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"pair_template: {path} cannot be read: {error}") from error
    return ChatTemplate(source, special_tokens(texts))


def _read_tokenizer(text: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json. Raises BadRequest."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain exceptions
        raise BadRequest(f"{TOKENIZER} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _eos_ids(folder: Path) -> frozenset[int]:
    """Return the end-of-text ids of the generation config and the model config, as the worker does."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        for source in (config, config.get("text_config") or {}):
            ids = source.get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)
