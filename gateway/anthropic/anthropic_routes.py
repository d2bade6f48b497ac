"""Anthropic's routes `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.answers.respond import Answers, sent_of
from gateway.anthropic.anthropic_bodies import CountTokensRequest, MessagesRequest
from gateway.anthropic.anthropic_errors import ANTHROPIC_ERRORS
from gateway.anthropic.anthropic_parse import conversation_of, parse, rules_of, tools_in
from gateway.anthropic.anthropic_write import FRAMING, MessagesAnswer
from gateway.auth.callers import Caller, caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.bodies.parameter_check import ignore
from gateway.calls.parsed_call import Models, Sent
from gateway.calls.pipeline import Pipeline
from gateway.http import openapi
from gateway.http.access import CALL, TEXT, Routes
from gateway.http.paths import COUNT_TOKENS, MESSAGES
from gateway.overload import large
from gateway.text.answer_form import found_form
from gateway.text.counted import MAX_CHARACTERS_PER_TOKEN, check_tokens, most_tokenized


class AnthropicEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, pipeline: Pipeline) -> None:
        self._answers = answers
        self._pipeline = pipeline

    async def messages(self, body: MessagesRequest, request: Request) -> Response:
        """Answer `/v1/messages`."""
        answer = self._answer(body, await sent_of(MESSAGES, request), caller_of(request))
        return await self._answers.respond(answer, stream=bool(body.stream), errors=ANTHROPIC_ERRORS, framing=FRAMING)

    async def _answer(self, body: MessagesRequest, sent: Sent, caller: Caller) -> MessagesAnswer:
        pipeline = self._pipeline
        make = partial(parse, body, caller, pipeline.settings, sent)
        generation = await pipeline.run_once(await pipeline.parsed(body, caller, len(sent.raw), make))
        shows = body.thinking is None or body.thinking.display != "omitted"
        return MessagesAnswer(generation, shows_thinking=shows)

    async def count_tokens(self, body: CountTokensRequest, request: Request) -> Response:
        """Answer `/v1/messages/count_tokens`."""
        return await self._answers.respond(
            self._count(body, caller_of(request), len(await request.body())), errors=ANTHROPIC_ERRORS
        )

    async def _count(self, body: CountTokensRequest, caller: Caller, num_bytes: int) -> Response:
        pipeline, settings = self._pipeline, self._pipeline.settings
        chat, tools = await pipeline.parsed(
            body, caller, num_bytes, lambda: (conversation_of(body, settings), tools_in(body, settings))
        )
        models = Models([body.model])
        base = await pipeline.call_resolver.base_of(models, caller, worker=False)
        [target] = await pipeline.call_resolver.targets(models, base, caller)
        check = check_tokens(most_tokenized(base), "messages")

        async def tokenize() -> int:
            encoded = await target.files.encode_chat(
                chat.messages,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final=chat.continue_final,
                variables=chat.variables,
                tenant=target.payer(caller),
                tools=tools.definitions if tools is not None else None,
                check=lambda text: check(len(text) // MAX_CHARACTERS_PER_TOKEN),
            )
            form = await found_form(target.files, tools, opened=encoded.opened, continued=encoded.continued)
            ignore(caller.headers, [*chat.left_out, *rules_of(body, settings).check_form(form)])
            check(len(encoded.ids))
            return len(encoded.ids)

        return json_response({"input_tokens": await large.work(tokenize)})


def add_anthropic_routes(app: FastAPI, anthropic: AnthropicEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(MESSAGES, CALL, responses=openapi.MESSAGES)(anthropic.messages)
    routes.post(COUNT_TOKENS, TEXT, responses=openapi.COUNTED)(anthropic.count_tokens)
