"""*Parse* for Ollama's API: convert a body to a `ParsedCall`. Pure.

Names and defaults are Ollama's; the few unsupported features are refused by name (`bodies/parameters.toml`).
"""

from __future__ import annotations

import secrets
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gateway.auth.callers import Caller
from gateway.bodies.parameter_check import MAX_NAMED
from gateway.calls.parsed_call import CallOptions, ChatPrompt, Models, ParsedCall, Rules, Texts
from gateway.chat.messages import stand_in
from gateway.encoders.encoder_bodies import EmbeddingsRequest
from gateway.encoders.encoder_parse import parse_embeddings
from gateway.grammars.limits import check_num
from gateway.grammars.notation import Constraint
from gateway.grammars.schemas import ANY_OBJECT, checked_schema
from gateway.ollama import ollama_bodies
from gateway.ollama.ollama_bodies import EmbedRequest, OllamaChatRequest, OllamaGenerateRequest
from gateway.openai.openai_bodies import MAX_TOOLS
from gateway.openai.openai_parse import stop_strings
from gateway.text.answer_form import AnswerForm
from gateway.tools.definitions import Tools, tools_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest
from protocol.wire.messages.requests import SEED_BITS

DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.9

TAG = ":latest"
"""The tag that Ollama appends to names without one."""

_WITHOUT_RAW = ("system", "think")


@dataclass(frozen=True, slots=True)
class OllamaRules(Rules):
    """The checks of later stages, and Ollama's way to limit the output to the context."""

    num_ctx: int | None = None  # the client's limit of prompt and output tokens
    thinks: str = ""  # the model's name, if reasoning is requested

    def check_form(self, form: AnswerForm | None) -> Sequence[str]:
        """Refuse a request for reasoning if the model's template has no marks of it. Raises BadRequest."""
        if self.thinks and (form is None or form.thought is None):
            raise BadRequest(f'"{self.thinks}" does not support thinking', param="think")
        return ()

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return the maximum output tokens, limited by the context's remaining room.

        Raises BadRequest without any room.
        """
        context = min(self.num_ctx or max_model_len, max_model_len)
        room = context - num_prompt_tokens
        if room < 1:
            message = f"the prompt has {num_prompt_tokens} tokens; the context has {context} (num_ctx, or the model's)"
            raise BadRequest(message, param=self.param, code="context_length_exceeded")
        return min(options.max_tokens or room, room)


def plain_name(name: str) -> str:
    """Return a model's name without Ollama's default tag."""
    return name.removesuffix(TAG)


def tagged_name(name: str) -> str:
    """Return a model's name with a tag, as in Ollama's lists."""
    return name if ":" in name.rpartition("/")[2] else name + TAG


def parse(request: OllamaChatRequest | OllamaGenerateRequest, caller: Caller, settings: Settings) -> ParsedCall:
    """Return the call that a body describes. Raises BadRequest naming the parameter."""
    is_chat = isinstance(request, OllamaChatRequest)
    given = request.options or ollama_bodies.Options()
    rules = OllamaRules(
        "messages" if is_chat else "prompt",
        settings.max_choices,
        given.num_ctx,
        request.model if request.think else "",
    )
    return ParsedCall(
        caller=caller,
        models=Models([plain_name(request.model)]),
        inputs=_conversation(request, settings) if isinstance(request, OllamaChatRequest) else _inputs(request),
        options=_options(request, given, settings),
        rules=rules,
        model_name=request.model,
        form_param="tools" if isinstance(request, OllamaChatRequest) and request.tools else "format",
    )


def parse_embed(request: EmbedRequest, caller: Caller, settings: Settings) -> ParsedCall:
    """Return the call that a body of `/api/embed` describes. Raises BadRequest."""
    asked = EmbeddingsRequest(model=plain_name(request.model), input=request.input, dimensions=request.dimensions)
    return parse_embeddings(asked, caller, settings)


def _options(
    request: OllamaChatRequest | OllamaGenerateRequest, given: ollama_bodies.Options, settings: Settings
) -> CallOptions:
    num_logprobs = _num_logprobs(request, settings)
    return CallOptions(
        sampling=_sampling(given, num_logprobs),
        max_tokens=given.num_predict if given.num_predict is not None and given.num_predict > 0 else None,
        stop=stop_strings(given.stop, settings),
        stream=request.streams,
        constraint=_constraint(request.format, settings),
        num_shown=num_logprobs,
        tools=_tools(request, settings) if isinstance(request, OllamaChatRequest) else None,
    )


def _num_logprobs(request: OllamaChatRequest | OllamaGenerateRequest, settings: Settings) -> int | None:
    num = request.top_logprobs
    if num is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    check_num(num or 0, settings.max_logprobs, "tokens", "top_logprobs")
    return (num or 0) if request.logprobs else None


def _sampling(given: ollama_bodies.Options, num_logprobs: int | None) -> m.Sampling:
    seed = given.seed if given.seed is not None and given.seed >= 0 else None  # -1 means a random seed in Ollama
    return m.Sampling(
        temperature=_or(given.temperature, DEFAULT_TEMPERATURE),
        top_p=_or(given.top_p, DEFAULT_TOP_P),
        top_k=max(_or(given.top_k, DEFAULT_TOP_K), 0),
        min_p=_or(given.min_p, 0.0),
        typical_p=_or(given.typical_p, 1.0),
        seed=secrets.randbits(SEED_BITS) if seed is None else seed,
        repetition_penalty=1.0 if given.repeat_last_n == 0 else _or(given.repeat_penalty, 1.0),
        repetition_window=max(_or(given.repeat_last_n, -1), 0),
        presence_penalty=_or(given.presence_penalty, 0.0),
        frequency_penalty=_or(given.frequency_penalty, 0.0),
        num_logprobs=num_logprobs,
    )


def _constraint(form: str | dict[str, Any] | None, settings: Settings) -> Constraint | None:
    """Return the constraint of a `format`, None if unconstrained. Raises BadRequest."""
    if isinstance(form, str) and form not in ("", "json"):
        raise BadRequest(f'format must be "json" or a JSON schema, not {brief(form)}', param="format")
    if form in (None, ""):
        return None
    return {"json_schema": checked_schema(ANY_OBJECT if form == "json" else form, "format", settings)}


def _tools(request: OllamaChatRequest, settings: Settings) -> Tools | None:
    check_num(len(request.tools or ()), MAX_TOOLS, "entries", "tools")
    return tools_of(request.tools, None, None, settings)


def _inputs(request: OllamaGenerateRequest) -> ChatPrompt | Texts:
    prompt = request.prompt or ""
    if request.raw:
        for name in _WITHOUT_RAW:
            if getattr(request, name):
                raise BadRequest(f"{name} has no effect beside raw: no template is rendered", param=name)
        return Texts([prompt])
    messages = [{"role": "system", "content": request.system}] if request.system else []
    return ChatPrompt([*messages, {"role": "user", "content": prompt}], _variables(request))


def _conversation(request: OllamaChatRequest, settings: Settings) -> ChatPrompt:
    given = request.messages or []
    check_num(len(given), settings.max_messages, "entries", "messages")
    messages = openai_messages(given)
    last = messages[-1]
    goes_on = last.get("role") == "assistant" and bool(last.get("content")) and not last.get("tool_calls")
    unread = (f"messages[{i}].images" for i, one in enumerate(given) if one.get("images"))
    return ChatPrompt(
        messages,
        _variables(request),
        add_generation_prompt=not goes_on,
        continue_final=goes_on,
        left_out=list(islice(unread, MAX_NAMED)),
    )


def _variables(request: OllamaChatRequest | OllamaGenerateRequest) -> dict[str, Any]:
    """Return the template variables that set reasoning and its effort; model families use different ones."""
    if request.think is None:
        return {}
    variables: dict[str, Any] = {"enable_thinking": bool(request.think), "thinking": bool(request.think)}
    return variables | ({"reasoning_effort": request.think} if isinstance(request.think, str) else {})


def openai_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in OpenAI's form, where calls have ids by which results refer to them.

    Values of wrong types are kept, and refused later with all messages. Raises BadRequest for images, except in tool
    results, where a text replaces them.
    """
    found: list[dict[str, Any]] = []
    open_calls = _OpenCalls()
    for i, message in enumerate(messages):
        images = message.get("images")
        if images and message.get("role") != "tool":
            raise BadRequest(f"messages[{i}].images: this model accepts text only", param=f"messages[{i}].images")
        one = {key: value for key, value in message.items() if key not in ("images", "tool_name")}
        calls = one.get("tool_calls")
        if isinstance(calls, list):
            one["tool_calls"] = [_with_id(call, f"{i:04}{n:05}", open_calls) for n, call in enumerate(calls)]
        if one.get("role") == "tool":
            content = one.get("content")
            if images and isinstance(content, str | None):
                one["content"] = "\n".join(filter(None, [content, stand_in("image")]))
            name = message.get("tool_name")
            answered = open_calls.answered(name)
            if answered is not None:
                one.setdefault("tool_call_id", answered)
            if name is not None:
                one.setdefault("name", name)
        found.append(one)
    return found


class _OpenCalls:
    """The calls without results, in order; adding and finding one takes constant time."""

    def __init__(self) -> None:
        self._ids: dict[int, Any] = {}  # ids by call number
        self._of_name: defaultdict[str, deque[int]] = defaultdict(deque)  # call numbers, maybe with results
        self._num = 0

    def add(self, name: Any, id_: Any) -> None:
        """Add a call; one whose name is not a string is refused later."""
        self._ids[self._num] = id_
        if isinstance(name, str):
            self._of_name[name].append(self._num)
        self._num += 1

    def answered(self, name: Any) -> Any:
        """Remove and return the id of the first open call of a function, or of any for None; None if there is none."""
        if name is None:
            return self._ids.pop(next(iter(self._ids)), None) if self._ids else None
        numbers = self._of_name.get(name) if isinstance(name, str) else None
        while numbers:
            number = numbers.popleft()
            if number in self._ids:
                return self._ids.pop(number)
        return None


def _with_id(call: Any, id_: str, open_calls: _OpenCalls) -> Any:
    """Return a tool call with an id and a type, and add it to the open calls."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    id_ = call.get("id") or id_
    open_calls.add(function.get("name"), id_)
    return {"type": "function", **call, "id": id_}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
