"""`/tokenize` in the forms of LoRAX and vLLM, and vLLM's `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.adapters.resolver import CallTarget
from gateway.answers.respond import Answers
from gateway.auth.callers import Caller, caller_of
from gateway.bodies import json_values
from gateway.bodies.json_bodies import JsonRoute
from gateway.bodies.parameter_check import ignore
from gateway.calls.parsed_call import ChatPrompt, Models
from gateway.calls.pipeline import Pipeline
from gateway.calls.tokenize import check_ids
from gateway.grammars.limits import check_num
from gateway.http import openapi
from gateway.http.access import INFER, TEXT, Routes
from gateway.http.errors import OPENAI_ERRORS
from gateway.http.paths import DETOKENIZE, TOKENIZE
from gateway.lorax.lorax_errors import LORAX_ERRORS, GenerationFailed
from gateway.lorax.lorax_parse import models_of
from gateway.openai.openai_bodies import MAX_TOOLS, ChatRequest
from gateway.openai.openai_parse import conversation_of
from gateway.overload import large
from gateway.text.counted import MAX_CHARACTERS_PER_TOKEN, check_tokens, most_tokenized
from gateway.text.tokenizer import Encoding
from gateway.tokenizer.tokenizer_bodies import DetokenizeRequest, TokenizeRequest
from gateway.tools.definitions import Tools, tools_of
from protocol.wire import messages as m

TOKENIZER_CONFIG = "tokenizer_config.json"

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""transformers' class for a tokenizer.json whose model does not name one."""


class TokenizerEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, pipeline: Pipeline) -> None:
        self._respond = answers.respond
        self._pipeline = pipeline
        self._info = b""  # cached answer of `/tokenizer_info`

    async def tokenize(self, body: TokenizeRequest, request: Request) -> Response:
        """Answer `/tokenize`, in LoRAX's or vLLM's form."""
        form, caller = body.form(), caller_of(request)
        if form == "inputs":
            return await self._respond(self._of_inputs(body, caller), errors=LORAX_ERRORS)
        answer = (
            self._of_prompt(body, caller)
            if form == "prompt"
            else self._of_messages(body, caller, len(await request.body()))
        )
        return await self._respond(answer, errors=OPENAI_ERRORS)

    async def detokenize(self, body: DetokenizeRequest, request: Request) -> Response:
        """Answer `/detokenize`."""
        return await self._respond(self._text(body, caller_of(request)))

    async def info(self) -> Response:
        """Answer `/tokenizer_info` with the base model's `tokenizer_config.json` and its chat template."""
        files = self._pipeline.files
        if not self._info:
            text = files.texts.get(TOKENIZER_CONFIG, "{}")
            config: dict[str, Any] = json_values.loads(text.encode(), TOKENIZER_CONFIG)
            config.setdefault("tokenizer_class", TOKENIZER_CLASS)
            if files.template is not None:
                config["chat_template"] = files.template.source
            self._info = orjson.dumps(config)
        return Response(self._info, media_type="application/json")

    # ------------------------------------------------------------ LoRAX's form

    async def _of_inputs(self, body: TokenizeRequest, caller: Caller) -> Response:
        pipeline, text = self._pipeline, body.inputs or ""
        base, target = pipeline.fleet.base, None
        if body.adapter_id or body.merged_adapters is not None:
            models, resolver = models_of(body), pipeline.call_resolver
            base = await resolver.base_of(models, caller, worker=False, refused=GenerationFailed)
            [target] = await resolver.targets(models, base, caller, GenerationFailed)

        async def tokenize() -> bytes:
            encoding = await self._encoding(text, body.add_special_tokens is not False, target, base, "inputs")
            return await asyncio.to_thread(_tokens_json, encoding)

        return Response(await large.work(tokenize), media_type="application/json")

    # ------------------------------------------------------------ vLLM's forms

    async def _of_prompt(self, body: TokenizeRequest, caller: Caller) -> Response:
        base, target = await self._asked(body.model, caller)
        text, strings = body.prompt or "", bool(body.return_token_strs)

        async def tokenize() -> bytes:
            encoding = await self._encoding(text, body.add_special_tokens is not False, target, base, "prompt")
            return await asyncio.to_thread(_answer, encoding.ids, encoding.tokens if strings else None, base)

        return Response(await large.work(tokenize), media_type="application/json")

    async def _of_messages(self, body: TokenizeRequest, caller: Caller, num_bytes: int) -> Response:
        settings = self._pipeline.settings
        check_num(len(body.messages or ()), settings.max_messages, "entries", "messages")
        check_num(len(body.tools or ()), MAX_TOOLS, "entries", "tools")

        def make() -> tuple[ChatPrompt, Tools | None]:
            asked = body.model_dump(
                include={"messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
            )
            chat = conversation_of(ChatRequest(model=body.model or "", **asked))
            return chat, tools_of(body.tools, None, None, settings)

        chat, tools = await self._pipeline.parsed(body, caller, num_bytes, make)
        ignore(caller.headers, chat.left_out)
        base, target = await self._asked(body.model, caller)
        most, special, rendered = most_tokenized(base), bool(body.add_special_tokens), ""

        def check(text: str) -> None:
            nonlocal rendered
            rendered = text
            check_tokens(most, "messages")(len(text) // MAX_CHARACTERS_PER_TOKEN)

        async def tokenize() -> bytes:
            encoded = await target.files.encode_chat(
                chat.messages,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final=chat.continue_final,
                variables=chat.variables,
                tenant=target.payer(caller),
                check=check,
                add_special_tokens=special,
                tools=tools.definitions if tools is not None else None,
            )
            check_tokens(most, "messages")(len(encoded.ids))
            if not body.return_token_strs:
                return await asyncio.to_thread(_answer, encoded.ids, None, base)
            encoding = await self._encoding(rendered, special, target, base, "messages")
            return await asyncio.to_thread(_answer, encoding.ids, encoding.tokens, base)

        return Response(await large.work(tokenize), media_type="application/json")

    async def _text(self, body: DetokenizeRequest, caller: Caller) -> Response:
        base, target = await self._asked(body.model, caller)
        check_tokens(most_tokenized(base), "tokens")(len(body.tokens))
        vocab_size = target.vocab_size or base.vocab_size

        def text() -> bytes:
            check_ids(body.tokens, vocab_size, "tokens")
            return orjson.dumps({"prompt": target.files.tokens.decode(body.tokens, special=True)})

        return Response(await large.work(lambda: asyncio.to_thread(text)), media_type="application/json")

    # ------------------------------------------------------------ parts

    async def _asked(self, model: str | None, caller: Caller) -> tuple[m.ServedModel, CallTarget]:
        """Return the base model and the target whose tokenizer is requested.

        The base's context length is reduced to the target's. Raises as `CallResolver.targets`.
        """
        models = Models([model or ""])
        base = await self._pipeline.call_resolver.base_of(models, caller, worker=False)
        [target] = await self._pipeline.call_resolver.targets(models, base, caller)
        return target.within(base), target

    async def _encoding(
        self, text: str, special: bool, target: CallTarget | None, base: m.ServedModel | None, param: str
    ) -> Encoding:
        """Return the tokens of a text. Raises BadRequest naming `param` for too many."""
        files = self._pipeline.files if target is None else target.files
        check = check_tokens(most_tokenized(base), param)
        check(len(text) // MAX_CHARACTERS_PER_TOKEN)
        [encoding] = await files.encoder.detailed([text], add_special_tokens=special, check=check)
        return encoding


def _tokens_json(encoding: Encoding) -> bytes:
    """Return LoRAX's answer: each token with its position in the text."""
    parts = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
    return orjson.dumps([{"id": id_, "text": text, "start": start, "stop": stop} for id_, text, (start, stop) in parts])


def _answer(ids: list[int], strings: Any, base: m.ServedModel) -> bytes:
    """Return vLLM's answer. strings: the tokens' strings in the vocabulary, None if not requested."""
    return orjson.dumps({"count": len(ids), "max_model_len": base.max_model_len, "tokens": ids, "token_strs": strings})


def add_tokenizer_routes(app: FastAPI, tokenizer: TokenizerEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(TOKENIZE, TEXT, responses=openapi.TOKENIZED)(tokenizer.tokenize)
    routes.post(DETOKENIZE, TEXT, responses=openapi.DETOKENIZED)(tokenizer.detokenize)
    routes.get("/tokenizer_info", INFER, responses=openapi.TOKENIZER_INFO)(tokenizer.info)
