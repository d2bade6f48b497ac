"""*Parse* for Anthropic's API: convert a body to a `ParsedCall`. Pure.

Defaults are Anthropic's; unsupported features are refused by name (`bodies/parameters.toml`, `content.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from gateway.anthropic.anthropic_bodies import CountTokensRequest, MessagesRequest, ThinkingConfig
from gateway.anthropic.content import WORDS, definition_of, is_beyond, messages_of, unread_results
from gateway.auth.callers import Caller
from gateway.bodies.parameter_check import MAX_ENTRIES, MAX_NAMED
from gateway.calls.parsed_call import CallOptions, ChatPrompt, Models, ParsedCall, Rules, Sent
from gateway.grammars.limits import check_num
from gateway.grammars.notation import Constraint
from gateway.grammars.schemas import checked_schema
from gateway.openai.openai_bodies import MAX_TOOLS
from gateway.openai.openai_parse import check_variables, stop_strings
from gateway.text.answer_form import AnswerForm
from gateway.tools.definitions import Tools, tools_of
from protocol.queue.books.quota import Standing
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest
from protocol.wire.messages.requests import SEED_BITS

DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class MessagesRules(Rules):
    """The checks of later stages, and Anthropic's way to limit the output to the context."""

    thinks: bool = False  # reasoning is requested

    def check_form(self, form: AnswerForm | None) -> Sequence[str]:
        """Return `thinking` as ignored if the model's template has no marks of reasoning."""
        return ["thinking"] if self.thinks and (form is None or form.thought is None) else ()

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return the maximum output tokens, limited by the context's remaining room.

        Raises BadRequest without any room.
        """
        room = max_model_len - num_prompt_tokens
        if room < 1:
            # Agents recognize this wording, and shorten their conversation.
            message = f"prompt is too long: {num_prompt_tokens} tokens > {max_model_len - 1} maximum"
            raise BadRequest(message, param=self.param, code="context_length_exceeded")
        return min(options.max_tokens or room, room)

    def limit_headers(self, standing: Standing) -> dict[str, str]:
        """Return the headers that report the tenant's remaining limits, with times in RFC 3339."""
        headers: dict[str, str] = {}
        for what, allowance in (("requests", standing.requests), ("tokens", standing.tokens)):
            if allowance is not None:
                reset = datetime.now(UTC) + timedelta(milliseconds=allowance.reset_ms)
                headers[f"anthropic-ratelimit-{what}-limit"] = str(allowance.limit)
                headers[f"anthropic-ratelimit-{what}-remaining"] = str(allowance.remaining)
                headers[f"anthropic-ratelimit-{what}-reset"] = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
        return headers


def parse(request: MessagesRequest, caller: Caller, settings: Settings, sent: Sent | None = None) -> ParsedCall:
    """Return the call that a body describes. Raises BadRequest naming the parameter."""
    return ParsedCall(
        caller=caller,
        models=Models([request.model]),
        inputs=conversation_of(request, settings),
        options=_options(request, settings),
        rules=rules_of(request, settings),
        model_name=request.model,
        form_param="tools" if request.tools else "output_format" if request.output_format else "output_config.format",
        left_out=[
            f"tools[{i}] ({ascii(tool['type'])[1:-1]:.64})"
            for i, tool in enumerate(request.tools or ())
            if is_beyond(tool)
        ],
        sent=sent,
    )


def rules_of(request: CountTokensRequest, settings: Settings) -> MessagesRules:
    """Return the checks for a request."""
    thinks = request.thinking is not None and request.thinking.type == "enabled"
    return MessagesRules("messages", settings.max_choices, thinks)


def conversation_of(request: CountTokensRequest, settings: Settings) -> ChatPrompt:
    """Return the prompt of a request. Raises BadRequest naming the place."""
    check_num(len(request.messages), min(settings.max_messages, MAX_ENTRIES), "entries", "messages")
    messages, variables = messages_of(request.system, request.messages), _variables(request)
    left_out = list(islice(unread_results(request.messages), MAX_NAMED))
    if messages[-1]["role"] != "assistant":
        return ChatPrompt(messages, variables, left_out=left_out)
    last, place = messages[-1], f"messages[{len(request.messages) - 1}]"
    if "tool_calls" in last:
        raise BadRequest(f"{place}: the calls of the last message have no results yet", param=place)
    if not last["content"] and len(messages) > 1:  # nothing to continue
        return ChatPrompt(messages[:-1], variables, left_out=left_out)
    if not last["content"]:
        raise BadRequest(f"{place} is empty, and the only message", param=place)
    return ChatPrompt(messages, variables, add_generation_prompt=False, continue_final=True, left_out=left_out)


def tools_in(request: CountTokensRequest, settings: Settings) -> Tools | None:
    """Return the tools that may be called, None if none. Raises BadRequest."""
    tools, choice, parallel = request.tools or [], request.tool_choice, None
    check_num(len(tools), MAX_TOOLS, "entries", "tools")
    leaves = settings.hosted_tools == "leave_out"
    kept = {f"tools[{i}]": tool for i, tool in enumerate(tools) if not (leaves and is_beyond(tool))}
    given = [definition_of(tool, place) for place, tool in kept.items()]
    chosen: str | dict[str, Any] | None = None
    if choice is not None:
        parallel = not choice.disable_parallel_tool_use
        if (choice.name is None) == (choice.type == "tool"):
            raise BadRequest("tool_choice.name belongs to the type tool, which needs it", param="tool_choice.name")
        named = {"type": "function", "function": {"name": choice.name}}
        chosen = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    return tools_of(given, chosen, parallel, settings, WORDS, list(kept))


def _options(request: MessagesRequest, settings: Settings) -> CallOptions:
    thinking, top_p = request.thinking, request.top_p
    budget = thinking.budget_tokens if thinking is not None else None
    if budget is not None and budget >= request.max_tokens:
        if not request.tools:  # with tools it may span several answers, as in Anthropic's API
            limit = f"it must be less than max_tokens, {request.max_tokens}, unless tools are given"
            raise BadRequest(f"thinking.budget_tokens is {budget}; {limit}", param="thinking.budget_tokens")
        budget = None  # max_tokens ends this answer earlier
    return CallOptions(
        sampling=m.Sampling(
            temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=request.top_k or 0,
            seed=secrets.randbits(SEED_BITS),
        ),
        # A prefill yields one token, so 1 is the minimum; it is not shown if none is requested.
        max_tokens=max(request.max_tokens, 1),
        scores_only=not request.max_tokens,
        stop=stop_strings(request.stop_sequences, settings, "stop_sequences"),
        stream=bool(request.stream),
        constraint=_constraint(request, settings),
        tools=tools_in(request, settings),
        max_thought=budget,
    )


def _variables(request: CountTokensRequest) -> dict[str, Any]:
    """Return the template variables that set reasoning and its effort; model families use different ones."""
    variables = _thinking_variables(request.thinking)
    if request.output_config is not None and request.output_config.effort is not None:
        variables["reasoning_effort"] = request.output_config.effort
    given = request.chat_template_kwargs or {}
    check_variables(given)
    return variables | given


def _thinking_variables(thinking: ThinkingConfig | None) -> dict[str, Any]:
    if thinking is None:
        return {}
    if thinking.type != "enabled" and thinking.budget_tokens is not None:
        raise BadRequest("thinking.budget_tokens belongs to the type enabled", param="thinking.budget_tokens")
    if thinking.type == "enabled" and thinking.budget_tokens is None:
        raise BadRequest("thinking.budget_tokens: it is missing", param="thinking.budget_tokens")
    thinks = thinking.type != "disabled"
    budget = {} if thinking.budget_tokens is None else {"thinking_budget": thinking.budget_tokens}
    return {"enable_thinking": thinks, "thinking": thinks, **budget}


def _constraint(request: MessagesRequest, settings: Settings) -> Constraint | None:
    """Return the constraint of `output_config.format` or `output_format`, None if unconstrained. Raises BadRequest."""
    form, place = request.output_config.format if request.output_config is not None else None, "output_config.format"
    if request.output_format is not None:
        if form is not None:
            raise BadRequest(f"output_format is another name of {place}: give one of them", param="output_format")
        form, place = request.output_format, "output_format"
    if form is None:
        return None
    if form.get("type") != "json_schema":
        raise BadRequest(f"{place}.type must be json_schema, not {brief(form.get('type'))}", param=f"{place}.type")
    return {"json_schema": checked_schema(form.get("schema"), f"{place}.schema", settings)}
