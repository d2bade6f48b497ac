"""The HTTP bodies of the OpenAI API, and their meaning as sampling options. Pure: no queue, no tokenizer.

Unknown fields are ignored, as clients gain new ones every month. A known field that would change the answer and is not
supported is refused by name.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.adapters.merged import MergedAdapters
from gateway.text.structured import Constraint, constraint_of
from gateway.tools.tools import Tools, tools_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest
from protocol.wire.keys import BATCH, INTERACTIVE

DEFAULT_COMPLETION_TOKENS = 16
UNLIMITED = 1 << 31  # more than any context
MAX_LORA_SCALE = 100.0
_SEED_BITS = 63
_GOLDEN = 0x9E3779B97F4A7C15  # odd: multiples of it spread the seeds of the choices over all bits


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: with the former, every chunk tells the usage so far


class GenerationRequest(_Body):
    """What both routes share. null means the default, everywhere."""

    model: str | Annotated[list[str], Field(min_length=1)]  # of a list each gives its own choices
    lora_scale: Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)] | None = None
    merged_adapters: MergedAdapters | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    adapter_source: str | None = None  # this and the next two are LoRAX's
    api_token: str | None = None
    ignore_eos_token: bool | None = None

    @property
    def models(self) -> list[str]:
        """The names asked for."""
        return [self.model] if isinstance(self.model, str) else self.model

    @property
    def model_name(self) -> str:
        """The name that the answer carries."""
        return ",".join(self.models)


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    guideline: str | None = None  # LoRAX's: for templates that have one
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[str] | None = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given besides the messages."""
        own = {} if self.guideline is None else {"guideline": self.guideline}
        return own | (self.chat_template_kwargs or {})


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None


Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
COMPLETIONS: Endpoint = "/v1/completions"
REQUESTS: Mapping[str, type[ChatRequest] | type[CompletionRequest]] = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
}
"""Endpoint -> the body it takes."""


@dataclass(frozen=True, slots=True)
class Options:
    """A request's parameters, checked as far as they can be without the model."""

    sampling: m.Sampling  # its seed is the one of choice 0
    n: int
    max_tokens: int | None  # None: `default_tokens`, or less where there is less room
    default_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    stream: bool
    include_usage: bool
    echo: bool
    background: bool
    cls: str
    lora_scale: float
    constraint: Constraint | None = None  # on the form of the output
    num_best: int = 0  # of the n choices of a prompt only so many are shown, those with the best mean logprob; 0: all
    shows_logprobs: bool = False
    scores_only: bool = False  # no token is wanted, only the logprobs of the prompt
    tools: Tools | None = None  # that may be called
    running_usage: bool = False  # every chunk tells the usage so far

    @property
    def record_bytes(self) -> int:
        """Size of a token's logprob record, 0 without logprobs."""
        num = self.sampling.num_logprobs
        return 0 if num is None else m.logprob_record_bytes(num)


def options_of(request: ChatRequest | CompletionRequest, settings: Settings) -> Options:
    """Return what a request asks for. Raises BadRequest naming the parameter."""
    if isinstance(request, ChatRequest):
        max_tokens, num_logprobs, echo = _check_chat(request)
    else:
        max_tokens, num_logprobs, echo = _check_completion(request)
    if num_logprobs is not None and num_logprobs > settings.max_logprobs:
        param = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
        raise BadRequest(f"{param} is {num_logprobs}; the limit is {settings.max_logprobs}", param=param)
    _check_sizes(request, settings)
    n = num_best = request.n or 1
    if n > settings.max_choices:
        raise BadRequest(f"n is {n}; the limit is {settings.max_choices}", param="n")
    if isinstance(request, CompletionRequest) and request.best_of is not None:
        n = _best_of(request, num_best, settings)
    shows_logprobs, scores_only = num_logprobs is not None, False
    if n > num_best and num_logprobs is None:
        num_logprobs = 0  # to choose by
    if echo and shows_logprobs and max_tokens == 0:
        max_tokens, scores_only = 1, True  # a prompt is computed for its next token, which nobody sees
    stream, background = bool(request.stream), bool(request.background)
    if request.stream_options is not None and not stream:
        raise BadRequest("stream_options is only allowed when stream is true", param="stream_options")
    if stream and background:
        raise BadRequest("a background job cannot be streamed; leave out stream, or background", param="stream")
    if background and max_tokens == 0:
        raise BadRequest("max_tokens is 0: there is nothing to do in the background", param="max_tokens")
    usage_wish = request.stream_options
    include_usage = bool(usage_wish and usage_wish.include_usage)
    return Options(
        sampling=_sampling(request, num_logprobs, prompt_logprobs=echo and shows_logprobs),
        n=n,
        max_tokens=max_tokens,
        default_tokens=UNLIMITED if isinstance(request, ChatRequest) else DEFAULT_COMPLETION_TOKENS,
        stop=_stop(request, settings),
        stop_token_ids=request.stop_token_ids or [],
        stream=stream,
        include_usage=include_usage,
        running_usage=include_usage and bool(usage_wish and usage_wish.continuous_usage_stats),
        echo=echo,
        background=background,
        cls=BATCH if background or request.service_tier == "flex" else INTERACTIVE,
        lora_scale=1.0 if request.lora_scale is None else request.lora_scale,
        constraint=constraint_of(request.response_format, request.structured_outputs, settings),
        num_best=num_best,
        shows_logprobs=shows_logprobs,
        scores_only=scores_only,
        tools=_tools(request, settings) if isinstance(request, ChatRequest) else None,
    )


def _check_sizes(request: GenerationRequest, settings: Settings) -> None:
    """Refuse lists that are longer than the settings allow. Raises BadRequest."""
    sizes = [("logit_bias", len(request.logit_bias or {}), settings.max_logit_bias)]
    if isinstance(request, ChatRequest):
        sizes.append(("messages", len(request.messages), settings.max_messages))
    for param, num, limit in sizes:
        if num > limit:
            raise BadRequest(f"{param} has {num} entries; the limit is {limit}", param=param)


def _tools(request: ChatRequest, settings: Settings) -> Tools | None:
    return tools_of(request.tools, request.tool_choice, request.parallel_tool_calls, settings)


def _check_chat(request: ChatRequest) -> tuple[int | None, int | None, bool]:
    """Return (max tokens, logprobs, echo) of a chat request."""
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.functions:
        raise BadRequest("functions are not supported", param="functions")
    if request.modalities is not None and request.modalities != ["text"]:
        raise BadRequest("the only modality is text", param="modalities")
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if max_tokens == 0:
        raise BadRequest("max_tokens must be at least 1", param="max_tokens")
    return max_tokens, (request.top_logprobs or 0) if request.logprobs else None, False


def _check_completion(request: CompletionRequest) -> tuple[int | None, int | None, bool]:
    """Return (max tokens, logprobs, echo) of a completion request."""
    echo = bool(request.echo)
    if request.suffix:
        raise BadRequest("suffix is not supported", param="suffix")
    if request.max_tokens == 0 and not echo:
        raise BadRequest("max_tokens is 0, which is only meaningful with echo", param="max_tokens")
    return request.max_tokens, request.logprobs, echo


def _best_of(request: CompletionRequest, n: int, settings: Settings) -> int:
    """Return how many choices of a prompt are made, of which the best `n` are shown. Raises BadRequest."""
    best_of = request.best_of or n
    if best_of < n:
        raise BadRequest(f"best_of is {best_of}; it must be at least n, which is {n}", param="best_of")
    if best_of > settings.max_choices:
        raise BadRequest(f"best_of is {best_of}; the limit is {settings.max_choices}", param="best_of")
    if best_of > n and request.stream:
        raise BadRequest("the best of several choices is known at their end: it cannot be streamed", param="best_of")
    return best_of


def _sampling(request: GenerationRequest, num_logprobs: int | None, *, prompt_logprobs: bool) -> m.Sampling:
    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return m.Sampling(
        temperature=given(request.temperature, 1.0),
        top_p=given(request.top_p, 1.0),
        top_k=max(given(request.top_k, 0), 0),
        min_p=given(request.min_p, 0.0),
        typical_p=given(request.typical_p, 1.0),
        seed=secrets.randbits(_SEED_BITS) if request.seed is None else request.seed % (1 << _SEED_BITS),
        presence_penalty=given(request.presence_penalty, 0.0),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        repetition_penalty=given(request.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias or {}),
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
        min_tokens=given(request.min_tokens, 0),
        ignore_eos=bool(request.ignore_eos or request.ignore_eos_token),
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise BadRequest(f"the keys of logit_bias must be token ids: {error}", param="logit_bias") from error


def _stop(request: GenerationRequest, settings: Settings) -> list[str]:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > settings.max_stop_strings:
        message = f"stop has {len(stops)} strings; the limit is {settings.max_stop_strings}"
        raise BadRequest(message, param="stop")
    longest = max(map(len, stops), default=0)
    if longest > settings.max_stop_characters:
        message = f"a stop string has {longest} characters; the limit is {settings.max_stop_characters}"
        raise BadRequest(message, param="stop")
    return [stop for stop in stops if stop]


def check_token_ids(options: Options, vocab_size: int) -> None:
    """Refuse token ids that the model does not have. Raises BadRequest."""
    for param, ids in (("logit_bias", options.sampling.logit_bias), ("stop_token_ids", options.stop_token_ids)):
        for id_ in ids:
            if not 0 <= id_ < vocab_size:
                raise BadRequest(f"{param}: {id_} is not a token id, which are 0 to {vocab_size - 1}", param=param)


def max_new_tokens(options: Options, num_prompt_tokens: int, max_model_len: int, param: str) -> int:
    """Return how many tokens one choice may have. Raises BadRequest when prompt and output do not fit the context."""
    room = max_model_len - num_prompt_tokens
    wanted = options.max_tokens
    if room < (1 if wanted is None else min(wanted, 1)):
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
            f"{num_prompt_tokens} tokens. Please reduce the length of the prompt."
        )
        raise BadRequest(message, param=param, code="context_length_exceeded")
    if wanted is not None and wanted > room:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt, {wanted} in the completion). "
            "Please reduce the length of the prompt or max_tokens."
        )
        raise BadRequest(message, param=param, code="context_length_exceeded")
    limit = min(room, options.default_tokens) if wanted is None else wanted
    if options.sampling.min_tokens > limit:
        message = f"min_tokens is {options.sampling.min_tokens}; this request may have at most {limit} tokens"
        raise BadRequest(message, param="min_tokens")
    return limit


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of a prompt's choice; the first keeps the client's, so that n does not change it."""
    return (seed + index * _GOLDEN) % (1 << _SEED_BITS)


def fingerprint(base: m.ServedModel, digests: Sequence[str]) -> str:
    """Return the `system_fingerprint`: the same as long as base weights and adapters are."""
    return "fp_" + hashlib.sha256(f"{base.fingerprint}:{','.join(digests)}".encode()).hexdigest()[:12]
