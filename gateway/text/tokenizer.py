"""The tokenizer and chat template of a model or an adapter."""

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
    """A text as tokens, with what belongs to each."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]]  # where each begins and ends in the text, in characters
    special: Sequence[int]  # 1 for a special token, else 0
    tokens: Sequence[str]


Pair = tuple[str, str]
"""Two texts, such as a query and a document."""

PAIR_ROLES = ("query", "document")
"""The roles of a pair's texts in a chat template, as sentence-transformers and vLLM name them."""


class EncodedPair(NamedTuple):
    """A pair of texts as tokens."""

    ids: list[int]
    second: int = 0  # index of the first token of type 1; 0: there is none


class Encoder:
    """A tokenizer: the base model's, or that with an adapter's added tokens.

    It runs in threads, where the library frees the interpreter.
    """

    def __init__(self, tokenizer: Tokenizer, num_bytes: int = 0) -> None:
        """num_bytes: the memory that it takes beside the base's."""
        self._tokenizer = tokenizer
        self.num_bytes = num_bytes

    def id_of(self, token: str) -> int | None:
        """Return a token's id, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def with_added(self, added: Sequence[AddedToken]) -> Encoder:
        """Return what encodes with these added tokens in place of the own ones, and shares all else with this. Blocks.

        added: which `BaseTokens.with_added` takes. Raises AdapterRefused for those that the library numbers otherwise.
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
        """Return the tokens of each text, with what belongs to them.

        check: raises for a number of tokens that is too large, before lists are made of them.
        """

        def encode() -> list[Encoding]:
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            for encoding in found:
                check(len(encoding))
            return [Encoding(e.ids, e.offsets, e.special_tokens_mask, e.tokens) for e in found]

        return await asyncio.to_thread(encode)

    async def shortened(self, texts: Sequence[str], most: int) -> list[str]:
        """Return of each text its first tokens, at most so many, as text."""

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
        """Return the ids of each pair, and where its second text begins."""

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
    """Return the index from which on all tokens of a pair are of type 1, 0 if there are none, or others after them."""
    second = len(types) - sum(types)
    return second if 0 < second < len(types) and types[second] == 1 else 0


TOKEN_BYTES, CHARACTER_BYTES = 1000, 100
"""What the library takes for an added token and for each of its characters: measured, rounded up."""

MAX_RENDERED_CHARS = 4 << 20
"""Characters that an adapter's template may make of a conversation: no request has more either."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A conversation as tokens."""

    ids: list[int]
    opened: bool  # it ends within the model's reasoning
    continued: bool = False  # it ends within the text of an answer


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The base model's tokenizer, chat template and end tokens, or these with what an adapter brings."""

    name: str  # served name of the base
    encoder: Encoder
    tokens: TokenTable
    template: ChatTemplate | SandboxedTemplate | None
    eos_ids: frozenset[int]
    texts: Mapping[str, str]  # the base model's files that these were read from, by name
    pair_template: ChatTemplate | None = None  # the settings', that makes prompts of pairs of texts
    base_tokens: BaseTokens | None = None  # what `tokens` are of; None in files that are no model's own
    tokenizer: str = ""  # hash of the base's tokenizer.json
    own_ends: frozenset[int] = frozenset()  # end tokens that the base does not have, so that workers do not know them

    @property
    def template_of_pairs(self) -> ChatTemplate | SandboxedTemplate | None:
        """What makes prompts of pairs: the settings' template, or the own one if it names the roles of a pair's texts.

        None where there is neither.
        """
        own = self.template
        if self.pair_template is not None or own is None:
            return self.pair_template
        return own if all(role in own.source for role in PAIR_ROLES) else None

    async def encode_pairs(self, pairs: Sequence[Pair], *, tenant: str) -> list[EncodedPair]:
        """Return the tokens of pairs of texts: as a template makes prompts of them, or as the tokenizer joins them.

        tenant: who has the sandbox work, where it must. Raises as `encode_chat`.
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
        """Return the tokens of a conversation. tenant: who has the sandbox work, where it must.

        continue_final: the last message, the assistant's, goes on. add_special_tokens: beside the template's own.
        `check` is shown the rendered text before it is tokenized. Raises BadRequest when it cannot be rendered,
        Overloaded and Unavailable when the sandbox has no place, and what `check` does.
        """
        template, encoder = self.template, self.encoder
        if template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", code="no_chat_template")

        def prepare() -> tuple[list[Message], str | None, dict[str, Any]]:
            """Return the messages as templates have them, what of the last one is continued, and what else they get."""
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
    """Return a rendered conversation, in which the template has written the special tokens itself, with its tokens.

    final: the text at its end that is to be continued, None for none.
    """
    opened = text.rstrip().endswith(tuple(begin for begin, _ in THOUGHTS))
    if final is not None:
        opened = opened or any(final.rfind(begin) > final.rfind(end) for begin, end in THOUGHTS)
    return EncodedChat(ids[0], opened, continued=bool(final and final.strip()) and not opened)


def load_model_files(settings: Settings) -> ModelFiles:
    """Read tokenizer, chat template and end tokens of `settings.model`. Blocks; raises BadRequest if it is no model."""
    folder = model_folder(settings.model, TOKENIZER_FILES)
    try:
        return _model_files(settings, folder)
    except AdapterRefused as error:  # the same files may be an adapter's
        raise BadRequest(f"{folder}: {error.message}") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # not UTF-8, no JSON or none of that form
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
    """Return the template of the settings that makes prompts of pairs. Raises BadRequest for a file that is none."""
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
    """Return the ids that end a text: of the generation config and of the model config, as the worker does."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        for source in (config, config.get("text_config") or {}):
            ids = source.get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)
