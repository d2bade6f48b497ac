"""*Parse* for the Responses API: convert a body and its conversation to a `ParsedCall`. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import msgspec
import orjson

from gateway.auth.callers import Caller
from gateway.bodies.parameter_check import MAX_ENTRIES, MAX_NAMED
from gateway.calls.parsed_call import CallOptions, ChatPrompt, Models, ParsedCall, Rules, Sent, Truncation
from gateway.grammars.limits import check_num
from gateway.grammars.notation import Constraint
from gateway.grammars.schemas import ANY_OBJECT, checked_schema, is_strict
from gateway.openai.openai_parse import check_variables, stop_strings
from gateway.overload.large import PLAIN_BYTES
from gateway.responses.items import Item, messages_of, unread_results
from gateway.responses.response_bodies import InputTokensRequest, PromptRequest, ResponseRequest, conversation_id_of
from gateway.responses.tools import is_hosted, shown_tool, tools_in
from gateway.text.counted import check_tokens
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest
from protocol.wire.keys import BATCH, INTERACTIVE
from protocol.wire.messages.requests import SEED_BITS

LOGPROBS = "message.output_text.logprobs"
"""The supported value of `include`."""

ENCRYPTED = "reasoning.encrypted_content"
"""The value of `include` accepted without effect: reasoning is returned, and sent back, as plain text."""


PART_BYTES = 1 << 7
"""Weight of an item, or a part of one, beside its text."""


@dataclass(frozen=True, slots=True)
class Context:
    """The conversation that a body continues, and the items that it references."""

    items: Sequence[Item] = ()  # items of the previous response, its output last
    known: Mapping[str, Item] = field(default_factory=dict[str, Item])  # referenced items by id

    @property
    def num_bytes(self) -> int:
        """An estimate of what the items weigh beside a body's bytes; counted until they are many."""
        num = 0
        for part in chain.from_iterable(
            content if isinstance(content := item.get("content"), list) else (item,) for item in self.items
        ):
            num += PART_BYTES + sum(len(value) for value in part.values() if isinstance(value, str))
            if num > PLAIN_BYTES:
                break
        return num


@dataclass(frozen=True, slots=True)
class ResponseRules(Rules):
    """The checks of later stages, and OpenAI's way to limit the output to the context."""

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return the maximum output tokens, limited by the context's remaining room.

        Raises BadRequest without any room.
        """
        room = max_model_len - num_prompt_tokens
        if room < 1:
            message = (
                f"This model's maximum context length is {max_model_len} tokens. However, your input has "
                f"{num_prompt_tokens} tokens. Please reduce the length of the input, or set truncation to auto."
            )
            raise BadRequest(message, param=self.param, code="context_length_exceeded")
        return min(options.max_tokens or room, room)


@dataclass(frozen=True, slots=True)
class CountRules(Rules):
    """The checks of a prompt that is only counted."""

    most: int  # maximum tokens of a prompt

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return 0, because no answer is generated; the context is no limit. Raises BadRequest for too many tokens."""
        check_tokens(self.most, self.param)(num_prompt_tokens)
        return 0


def check_prompt(request: PromptRequest, settings: Settings) -> None:
    """Refuse an invalid prompt before anything is read from the queue. Raises BadRequest."""
    goes_on = request.previous_response_id is not None or request.conversation is not None
    if request.input is None and not goes_on:
        raise BadRequest("input: it is missing", param="input")
    if request.input == [] and not goes_on:
        raise BadRequest("input is an empty list", param="input")
    if not isinstance(request.input, str | None):
        check_num(len(request.input), min(settings.max_messages, MAX_ENTRIES), "entries", "input")
    if request.conversation is not None and request.previous_response_id is not None:
        text = "conversation and previous_response_id cannot be used together: both continue an earlier exchange"
        raise BadRequest(text, param="conversation", code="mutually_exclusive_parameters")


def check_input(request: ResponseRequest, settings: Settings, caller: Caller) -> None:
    """Refuse an invalid body before anything is read from the queue. Raises BadRequest."""
    check_prompt(request, settings)
    if request.background and request.store is False:
        raise BadRequest(
            "background can only be used when `store` is true: the response could not be retrieved", param="store"
        )
    if caller.is_batch and request.store:
        raise BadRequest("store cannot be true in a batch: the batch's output file has the response", param="store")
    if caller.is_batch and request.conversation is not None:
        text = "conversation is not supported in a batch: its lines run in any order, and nothing is stored"
        raise BadRequest(text, param="conversation")
    if request.conversation is not None and request.store is False:
        raise BadRequest("conversation needs store to be true: its items are stored", param="store")
    check_included(request.include)
    if request.top_logprobs and LOGPROBS not in (request.include or ()):
        raise BadRequest(f"top_logprobs needs {LOGPROBS} in include", param="top_logprobs")


def parse(
    request: ResponseRequest,
    caller: Caller,
    settings: Settings,
    sent: Sent | None = None,
    items: Sequence[Item] = (),
    call_id: str = "",
) -> ParsedCall:
    """Return the call that a body describes. Raises BadRequest naming the parameter.

    items: the whole conversation; empty for a stored body whose answer is only read.
    """
    return ParsedCall(
        caller=caller,
        models=Models([request.model]),
        inputs=_inputs(request, settings, items),
        options=_options(request, settings),
        rules=ResponseRules("input", settings.max_choices),
        model_name=request.model,
        form_param="tools" if request.tools else "text.format",
        metadata=request.metadata or {},
        call_id=call_id,
        shown=shown(request, is_stored=request.store is not False and not caller.is_batch),
        left_out=[f"tools[{i}] ({tool['type']})" for i, tool in enumerate(request.tools or ()) if is_hosted(tool)],
        sent=sent,
    )


def parse_count(
    request: InputTokensRequest, caller: Caller, settings: Settings, items: Sequence[Item], most: int
) -> ParsedCall:
    """Return the call whose prompt is to be counted. Raises BadRequest naming the parameter.

    most: maximum tokens counted; `truncation` limits the prompt to the context.
    """
    _constraint(request, settings)  # refuse an invalid response before anything is counted
    rules = ResponseRules("input", 1) if request.truncation == "auto" else CountRules("input", 1, most)
    return ParsedCall(
        caller=caller,
        models=Models([request.model]),
        inputs=_inputs(request, settings, items),
        options=CallOptions(m.Sampling(), background=True, tools=tools_in(request, settings)),  # it needs no worker
        rules=rules,
        form_param="tools",
    )


def _inputs(request: PromptRequest, settings: Settings, items: Sequence[Item]) -> ChatPrompt:
    """Return the prompt's messages and template variables. Raises BadRequest."""
    check_num(len(items), min(settings.max_messages, MAX_ENTRIES), "items, including earlier ones", "input")
    truncation = Truncation(None, drops_messages=True) if request.truncation == "auto" else None
    left_out = list(islice(unread_results(request.input), MAX_NAMED))
    messages = messages_of(request.instructions, items)
    return ChatPrompt(messages, _variables(request), truncation=truncation, left_out=left_out)


def check_included(include: Sequence[str] | None) -> None:
    """Refuse an unsupported value of `include`. Raises BadRequest."""
    for name in include or ():
        if name not in (LOGPROBS, ENCRYPTED):
            text = f"include: {brief(name)} is not supported; there is {LOGPROBS}, and {ENCRYPTED} without effect"
            raise BadRequest(text, param="include")


def shown(request: ResponseRequest, *, is_stored: bool) -> dict[str, Any]:
    """Return the fields of a body that its response repeats."""
    tools = [shown_tool(tool) for tool in request.tools or () if not is_hosted(tool)]
    form = (request.text.format if request.text is not None else None) or {"type": "text"}
    choice: str | dict[str, Any] = "auto" if request.tool_choice is None else request.tool_choice
    return {
        "model": request.model,
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "conversation": {"id": conversation_id_of(request)} if request.conversation is not None else None,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "text": {"format": form, "verbosity": "medium"},
        "reasoning": {"effort": request.reasoning.effort if request.reasoning is not None else None, "summary": None},
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "truncation": request.truncation or "disabled",
        "service_tier": "flex" if request.service_tier == "flex" else "default",
        "metadata": request.metadata or {},
        "store": is_stored,
        "user": None,
    }


def _options(request: ResponseRequest, settings: Settings) -> CallOptions:
    num_shown = (request.top_logprobs or 0) if LOGPROBS in (request.include or ()) else None
    if num_shown is not None and num_shown > settings.max_logprobs:
        raise BadRequest(f"top_logprobs is {num_shown}; the limit is {settings.max_logprobs}", param="top_logprobs")
    background = bool(request.background)
    return CallOptions(
        sampling=m.Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(request.top_k or 0, 0),
            seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed % (1 << SEED_BITS),
            num_logprobs=num_shown,
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        ),
        max_tokens=request.max_output_tokens,
        stop=stop_strings(request.stop, settings),
        stream=bool(request.stream) and not background,
        background=background,
        cls=BATCH if background or request.service_tier == "flex" else INTERACTIVE,
        lora_scale=request.lora_scale,
        constraint=_constraint(request, settings),
        tools=tools_in(request, settings),
        num_shown=num_shown,
        by_token=True,
    )


def _variables(request: PromptRequest) -> dict[str, Any]:
    """Return the template variables that set the reasoning effort."""
    effort = request.reasoning.effort if request.reasoning is not None else None
    given = request.chat_template_kwargs or {}
    check_variables(given)
    return ({} if effort is None else {"reasoning_effort": effort}) | given


def _constraint(request: PromptRequest, settings: Settings) -> Constraint | None:
    """Return the constraint of `text.format`, None if unconstrained. Raises BadRequest."""
    form, place = request.text.format if request.text is not None else None, "text.format"
    kind = form.get("type") if form is not None else "text"
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_schema": checked_schema(ANY_OBJECT, place, settings)}
    if kind != "json_schema":
        text = f"{place}.type must be text, json_object or json_schema, not {brief(kind)}"
        raise BadRequest(text, param=f"{place}.type")
    strict = is_strict(form, place)
    return {"json_schema": checked_schema(form.get("schema"), f"{place}.schema", settings, strict=strict)}


# ---------------------------------------------------------------- stored responses


def to_be_stored(
    call: ParsedCall, request: ResponseRequest, items: Sequence[Item], num_own: int, max_bytes: int
) -> bytes:
    """Return as JSON what `parse_stored` needs to write the answer, and what a later response needs to continue it.

    num_own: number of the last items, which are the body's own. Raises BadRequest for more than `max_bytes` of JSON.
    """
    kept = {
        "shown": dict(call.shown),
        "include": request.include,
        "background": request.background,
        "items": items,
        "num_own": num_own,
        "stop": request.stop,
    }
    raw = orjson.dumps(kept)
    if len(raw) > max_bytes:
        text = f"the conversation has {len(raw)} bytes; the limit is {max_bytes}"
        raise BadRequest(text, param="input", code="limit_exceeded")
    return raw


def parse_stored(kept: Mapping[str, Any], caller: Caller, settings: Settings) -> ParsedCall:
    """Parse a stored response's body, without its input. Raises as `parse`."""
    names = ("model", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens", "top_logprobs", "metadata")
    body = {name: kept["shown"][name] for name in names}
    request = ResponseRequest.model_validate({**body, "include": kept["include"], "background": kept["background"]})
    request = request.model_copy(update={"stop": kept.get("stop")})  # absent in responses of older gateways
    parsed = parse(request, caller, settings)
    return msgspec.structs.replace(parsed, shown=kept["shown"])
