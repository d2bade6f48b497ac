"""*Parse* for OpenAI's routes: convert a body to a `ParsedCall`. Pure."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from itertools import islice
from operator import attrgetter
from typing import Any

import orjson
from msgspec import structs

from gateway.auth.callers import Caller
from gateway.bodies.fields import sources_of
from gateway.bodies.parameter_check import MAX_NAMED
from gateway.calls.parsed_call import (
    UNLIMITED,
    CallOptions,
    ChatPrompt,
    Models,
    ParsedCall,
    Rules,
    Sent,
    Texts,
    Truncation,
)
from gateway.chat.messages import unread_results
from gateway.grammars.structured import OTHER_NAMES, constraint_of
from gateway.openai.openai_bodies import (
    BODIES,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_METADATA_KEY,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE,
    MAX_STOP_TOKEN_IDS,
    MAX_TOOLS,
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from gateway.tools.definitions import tools_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire import stop_regex
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest
from protocol.wire.keys import BATCH, INTERACTIVE
from protocol.wire.messages.requests import SEED_BITS

DEFAULT_COMPLETION_TOKENS = 16

_NOT_STORED = {
    "api_token", "metadata", "messages", "chat_template_kwargs", "guideline", "logit_bias", "response_format",
    "structured_outputs", "documents", "cache_salt", "truncation_side", "allowed_token_ids", "bad_words", *OTHER_NAMES,
}  # fmt: skip
"""Fields not needed to write an answer: they determine how it is generated, and the queued requests contain them."""

_TOKEN_ID = re.compile(r"-?[0-9]{1,18}")
"""An integer. Whether it is a token id is checked later, against the vocabulary."""

_MOST_ENTRIES: Mapping[str, int | Callable[[Settings], int]] = {
    "logit_bias": attrgetter("max_logit_bias"),
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "logprob_token_ids": MAX_LOGPROB_TOKEN_IDS,
    "bad_words": MAX_BAD_WORDS,
    "metadata": MAX_METADATA_PAIRS,
    "messages": attrgetter("max_messages"),
    "tools": MAX_TOOLS,
}
"""Field -> maximum entries of its list or object."""

_NO_VARIABLES = ("messages", "add_generation_prompt", "continue_final_message")
"""Variables of a chat template that `chat_template_kwargs` may not set."""


def parse(request: AnyRequest, caller: Caller, settings: Settings, sent: Sent | None = None) -> ParsedCall:
    """Return the call that a body describes. Raises BadRequest naming the parameter."""
    if (param := asks_whole(request)) is not None and caller.is_batch:
        raise BadRequest(f"{param} is -1, the whole vocabulary, which batches do not support", param=param)
    is_chat = isinstance(request, ChatRequest)
    names, others = [request.model] if isinstance(request.model, str) else request.model, _other_names(request)
    form_param, options = _form_param(request, others), _options(request, settings)
    inputs = _inputs(request, sent)
    constraint = constraint_of(request.response_format, request.structured_outputs, settings, others)
    tools = tools_of(request.tools, request.tool_choice, request.parallel_tool_calls, settings) if is_chat else None
    return ParsedCall(
        caller=caller,
        models=Models(
            names,
            request.adapter_source,
            request.merged_adapters,
            request.api_token or "",
            request.lora_path or "",
        ),
        inputs=inputs,
        options=structs.replace(options, constraint=constraint, tools=tools),
        rules=Rules("messages" if is_chat else "prompt", settings.max_choices),
        model_name=",".join(names),
        names_each=isinstance(request.model, list),
        form_param=form_param,
        metadata=request.metadata or {},
        left_out=("metadata",) if request.metadata and not request.background else (),
        answer_id=(sent.request_id if sent is not None else "") or request.request_id or "",
        cache_salt=request.cache_salt or "",
        sent=sent,
    )


def to_be_stored(request: AnyRequest, answer_id: str) -> bytes:
    """Return as JSON what `parse_stored` needs of a body to write its answer; prompts only if they are echoed.

    answer_id: the call's; a header may have given it.
    """
    body = request.model_dump(exclude_none=True, exclude=_NOT_STORED if request.echo else {*_NOT_STORED, "prompt"})
    if answer_id:
        body["request_id"] = answer_id
    if isinstance(request, ChatRequest):
        body["messages"] = request.messages[-1:] if request.echo else [{}]
    elif not request.echo:
        body["prompt"] = [""] * len(sources_of(request.prompt))
    return orjson.dumps(body)


def parse_stored(endpoint: str, body: Mapping[str, Any], caller: Caller, settings: Settings) -> ParsedCall:
    """Parse a stored body, given as JSON. Raises as `parse`."""
    return parse(BODIES[endpoint].model_validate(body), caller, settings)


def _inputs(request: AnyRequest, sent: Sent | None) -> ChatPrompt | Texts:
    truncation = _truncation(request)
    if request.background or (sent is not None and sent.key):
        _check_kept(request)
    if isinstance(request, ChatRequest):
        return conversation_of(request, truncation)
    special = request.add_special_tokens is not False
    return Texts(sources_of(request.prompt), add_special_tokens=special, truncation=truncation)


def _check_kept(request: AnyRequest) -> None:
    """Refuse fields whose answer needs the prompts, which are not kept. Raises BadRequest."""
    if request.return_token_ids:
        param, what = "return_token_ids", "the ids of a prompt are"
    elif (param := asks_whole(request)) is not None:
        what = "the logprobs of the whole vocabulary are"
    elif request.truncate_prompt_tokens is not None and request.echo and isinstance(request, CompletionRequest):
        param, what = "echo", "the echo of a shortened prompt is"
    else:
        return
    raise BadRequest(f"{what} not kept: leave out background, the Idempotency-Key or {param}", param=param)


def asks_whole(request: AnyRequest) -> str | None:
    """Return the field that requests logprobs of the whole vocabulary, None if none does."""
    names = ("prompt_logprobs", "top_logprobs" if isinstance(request, ChatRequest) else "logprobs")
    return next((name for name in names if getattr(request, name) == m.WHOLE), None)


def _truncation(request: AnyRequest) -> Truncation | None:
    """Return how prompts are shortened, None if they are not. Raises BadRequest."""
    num = request.truncate_prompt_tokens
    if num == 0:
        raise BadRequest("truncate_prompt_tokens must be at least 1, or -1", param="truncate_prompt_tokens")
    if num is None:
        if request.truncation_side is not None:
            raise BadRequest("truncation_side needs truncate_prompt_tokens", param="truncation_side")
        return None
    return Truncation(None if num == -1 else num, keeps_first=request.truncation_side == "right")


def conversation_of(request: ChatRequest, truncation: Truncation | None = None) -> ChatPrompt:
    """Return the prompt of a chat request. Raises BadRequest for contradictory parameters."""
    variables, continue_final = _variables(request), bool(request.continue_final_message)
    if continue_final and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot be used together"
        raise BadRequest(message, param="continue_final_message")
    check_variables(variables)
    begin_answer = request.add_generation_prompt is not False and not continue_final
    return ChatPrompt(
        request.messages,
        variables,
        begin_answer,
        continue_final,
        add_special_tokens=bool(request.add_special_tokens),
        truncation=truncation,
        echoes=bool(request.echo),
        left_out=list(islice(unread_results(request.messages), MAX_NAMED)),
    )


def _variables(request: ChatRequest) -> dict[str, Any]:
    """Return the chat template's variables besides the messages."""
    own = {
        name: value
        for name in ("guideline", "documents", "reasoning_effort")
        if (value := getattr(request, name)) is not None
    }
    return own | (request.chat_template_kwargs or {})


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse template variables that have parameters of their own. Raises BadRequest."""
    for name in _NO_VARIABLES:
        if name in variables:
            param = f"chat_template_kwargs.{name}"
            raise BadRequest(f"{param} has no effect: {name} is a separate parameter", param=param)


def _form_param(request: AnyRequest, others: Mapping[str, Any]) -> str:
    """Return the field that constrains the output. others: the given fields of `OTHER_NAMES`."""
    if isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none":
        return "tools"
    if request.structured_outputs is not None:
        return "structured_outputs"
    return next(iter(others), "response_format")


def _options(request: AnyRequest, settings: Settings) -> CallOptions:
    """Return the parameters of a call, except the constraint of its output and its tools. Raises BadRequest."""
    if isinstance(request, ChatRequest):
        max_tokens, num_shown, echo = _check_chat(request)
    else:
        max_tokens, num_shown, echo = _check_completion(request)
    _check_logprobs(request, num_shown, max_tokens, settings)
    _check_sizes(request, settings)
    n = num_best = request.n or 1
    if n > settings.max_choices:
        raise BadRequest(f"n is {n}; the limit is {settings.max_choices}", param="n")
    if isinstance(request, CompletionRequest) and request.best_of is not None:
        n = _best_of(request, num_best, settings)
    of_prompt = [num for num in (request.prompt_logprobs, num_shown if echo else None) if num is not None]
    num_logprobs = len(request.logprob_token_ids) if request.logprob_token_ids else num_shown
    if n > num_best and num_logprobs is None:
        num_logprobs = 0  # choices are ranked by their logprobs
    scores_only = bool(of_prompt) and max_tokens == 0
    if scores_only:
        max_tokens = 1  # a prefill yields one token, which is not shown
    stream, background = bool(request.stream), bool(request.background)
    if request.stream_options is not None and not stream:
        raise BadRequest("stream_options is only allowed when stream is true", param="stream_options")
    if stream and background:
        raise BadRequest("a background job cannot be streamed; leave out stream, or background", param="stream")
    if background and max_tokens == 0:
        raise BadRequest("max_tokens is 0, so there is nothing to run in the background", param="max_tokens")
    if request.include_metrics and background:
        raise BadRequest("jobs report their timings as fields: leave out include_metrics", param="include_metrics")
    forced, wish = settings.force_include_usage, request.stream_options
    include_usage = forced or bool(wish and wish.include_usage)
    return CallOptions(
        sampling=_sampling(request, num_logprobs, m.WHOLE if m.WHOLE in of_prompt else max(of_prompt, default=None)),
        n=n,
        max_tokens=max_tokens,
        default_tokens=UNLIMITED if isinstance(request, ChatRequest) else DEFAULT_COMPLETION_TOKENS,
        stop=stop_strings(request.stop, settings),
        stop_token_ids=request.stop_token_ids or [],
        bad_words=request.bad_words or [],
        stream=stream,
        include_usage=include_usage,
        running_usage=forced or (include_usage and bool(wish and wish.continuous_usage_stats)),
        echo=echo,
        background=background,
        cls=BATCH if background or request.service_tier == "flex" else INTERACTIVE,
        lora_scale=request.lora_scale,
        includes_stop=bool(request.include_stop_str_in_output),
        num_best=num_best,
        num_shown=num_shown,
        num_shown_of_prompt=request.prompt_logprobs,
        shows_ids=bool(request.return_token_ids),
        shows_metrics=_given(request.include_metrics, settings.per_request_metrics),
        names_ids=_given(request.return_tokens_as_token_ids, settings.return_tokens_as_token_ids),
        hides_reasoning=isinstance(request, ChatRequest) and request.include_reasoning is False,
        scores_only=scores_only,
    )


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _check_logprobs(request: AnyRequest, num_shown: int | None, max_tokens: int | None, settings: Settings) -> None:
    """Refuse more logprobs than allowed, and options that need logprobs without them. Raises BadRequest."""
    param = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
    for name, num in ((param, num_shown), ("prompt_logprobs", request.prompt_logprobs)):
        # `calls.size` limits the bytes of the whole vocabulary's, once its size is known.
        if num is not None and (num > settings.max_logprobs or (num == m.WHOLE and not settings.max_logprobs)):
            asked = "-1, the whole vocabulary" if num == m.WHOLE else num
            raise BadRequest(f"{name} is {asked}; the limit is {settings.max_logprobs}", param=name)
    for name in ("logprob_token_ids", "return_tokens_as_token_ids"):
        if getattr(request, name) and num_shown is None:
            raise BadRequest(f"{name} needs logprobs", param=name)
    if request.logprob_token_ids and max_tokens == 0:
        raise BadRequest("logprob_token_ids needs output tokens, but max_tokens is 0", param="logprob_token_ids")
    if request.prompt_logprobs is not None and request.stream:
        message = "prompt_logprobs cannot be streamed, as in vLLM; echo with logprobs can"
        raise BadRequest(message, param="prompt_logprobs")


def _check_sizes(request: GenerationRequest, settings: Settings) -> None:
    """Refuse lists, objects and strings beyond their limits. Raises BadRequest."""
    sent = request.model_fields_set
    for param, most in _MOST_ENTRIES.items():
        if param not in sent or param not in type(request).model_fields:  # undeclared fields have been checked before
            continue
        num, limit = len(getattr(request, param) or ()), most if isinstance(most, int) else most(settings)
        if num > limit:
            raise BadRequest(f"{param} has {num} entries; the limit is {limit}", param=param)
    if sent.isdisjoint(("metadata", "bad_words")):
        return
    metadata = request.metadata or {}
    for what, texts, limit in (
        ("key of metadata", metadata.keys(), MAX_METADATA_KEY),
        ("value of metadata", metadata.values(), MAX_METADATA_VALUE),
        ("word of bad_words", request.bad_words or (), MAX_BAD_WORD_CHARACTERS),
    ):
        longest = max(map(len, texts), default=0)
        if longest > limit:
            message = f"a {what} has {longest} characters; the limit is {limit}"
            raise BadRequest(message, param=what.split()[-1])


def _other_names(request: AnyRequest) -> dict[str, Any]:
    """Return the given fields of `OTHER_NAMES`, without null and false."""
    sent = request.model_fields_set
    given = {name: getattr(request, name) for name in OTHER_NAMES if name in sent}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def _check_chat(request: ChatRequest) -> tuple[int | None, int | None, bool]:
    """Return (max tokens, logprobs, echo) of a chat request. Its echo is False: a chat echoes its last message."""
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    return max_tokens, (request.top_logprobs or 0) if request.logprobs else None, False


def _check_completion(request: CompletionRequest) -> tuple[int | None, int | None, bool]:
    """Return (max tokens, logprobs, echo) of a completion request. Raises BadRequest."""
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo and request.prompt_logprobs is None:
        raise BadRequest("max_tokens is 0, which is only meaningful with echo or prompt_logprobs", param="max_tokens")
    return request.max_tokens, request.logprobs, echo


def _best_of(request: CompletionRequest, n: int, settings: Settings) -> int:
    """Return how many choices are generated per prompt, of which the best `n` are shown. Raises BadRequest."""
    best_of = request.best_of or n
    if best_of < n:
        raise BadRequest(f"best_of is {best_of}; it must be at least n, which is {n}", param="best_of")
    if best_of > settings.max_choices:
        raise BadRequest(f"best_of is {best_of}; the limit is {settings.max_choices}", param="best_of")
    if best_of > n and request.stream:
        raise BadRequest(
            "best_of cannot be streamed: the best choices are known only when all have ended", param="best_of"
        )
    return best_of


def _sampling(request: GenerationRequest, num_logprobs: int | None, prompt_logprobs: int | None) -> m.Sampling:
    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    penalty = given(request.repetition_penalty, request.repeat_penalty)
    if request.repeat_penalty not in (None, penalty):
        raise BadRequest(
            "repeat_penalty is an alias of repetition_penalty, which has another value", param="repeat_penalty"
        )
    return m.Sampling(
        temperature=given(request.temperature, 1.0),
        top_p=given(request.top_p, 1.0),
        top_k=max(given(request.top_k, 0), 0),
        min_p=given(request.min_p, 0.0),
        typical_p=given(request.typical_p, 1.0),
        seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed % (1 << SEED_BITS),
        presence_penalty=given(request.presence_penalty, 0.0),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        repetition_penalty=1.0 if request.repeat_last_n == 0 else given(penalty, 1.0),
        repetition_window=max(given(request.repeat_last_n, -1), 0),
        logit_bias=_logit_bias(request.logit_bias or {}),
        shows_special=request.skip_special_tokens is False,
        allowed_token_ids=request.allowed_token_ids or [],
        num_logprobs=num_logprobs,
        logprob_token_ids=request.logprob_token_ids or [],
        prompt_logprobs=prompt_logprobs,
        min_tokens=given(request.min_tokens, 0),
        ignore_eos=bool(request.ignore_eos or request.ignore_eos_token),
        stop_regex=stop_regex.checked(request.stop_regex) if request.stop_regex else [],
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    wrong = list(islice((brief(token) for token in bias if _TOKEN_ID.fullmatch(token) is None), MAX_NAMED))
    if wrong:
        raise BadRequest(f"the keys of logit_bias must be token ids, not {', '.join(wrong)}", param="logit_bias")
    return {int(token): value for token, value in bias.items()}


def stop_strings(given: str | list[str] | None, settings: Settings, param: str = "stop") -> list[str]:
    """Return a body's stop strings, without empty ones. Raises BadRequest beyond their limits.

    param: the field's name.
    """
    stops = [given] if isinstance(given, str) else given or []
    if len(stops) > settings.max_stop_strings:
        message = f"{param} has {len(stops)} strings; the limit is {settings.max_stop_strings}"
        raise BadRequest(message, param=param)
    longest = max(map(len, stops), default=0)
    if longest > settings.max_stop_characters:
        message = f"a stop string has {longest} characters; the limit is {settings.max_stop_characters}"
        raise BadRequest(message, param=param)
    return [stop for stop in stops if stop]
