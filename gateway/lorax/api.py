"""The HTTP bodies of LoRAX's native API, and their meaning as sampling options. Pure: no queue, no tokenizer.

Names, defaults, ranges and the texts of refusals are LoRAX's, so that its clients and their tests need no change.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gateway.adapters.merged import MergedAdapters
from gateway.openai.api import UNLIMITED, Options
from gateway.text.structured import native_constraint
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest
from protocol.wire.keys import INTERACTIVE

MAX_ALTERNATIVES = 1000  # return_k_alternatives: each costs 8 bytes per token in the log
_SEED_BITS = 63


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class NativeMerge(MergedAdapters):
    """Adapters to be merged for a request; that there are as many weights as ids is told in LoRAX's words."""

    model_config = ConfigDict(extra="ignore")

    ids: list[str]
    weights: list[float] = Field(default_factory=list)


class AdapterParameters(_Body):
    """Which adapter, from where, on whose behalf."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: NativeMerge | None = None
    api_token: str | None = None


class Parameters(AdapterParameters):
    """The `parameters` of a generation. Ranges are checked by `native_options`, in LoRAX's words."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = None
    apply_chat_template: bool = False
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    response_format: dict[str, Any] | None = None


class GenerateRequest(_Body):
    """`POST /generate` and `/generate_stream`."""

    inputs: str
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    """`POST /` and `/invocations`."""

    stream: bool = False


class TokenizeRequest(AdapterParameters):
    """`POST /tokenize`. The adapter, whose tokenizer may be its own, is not LoRAX's."""

    inputs: str
    add_special_tokens: bool | None = None


@dataclass(frozen=True, slots=True)
class NativeOptions:
    """What a native request asks for."""

    options: Options
    seed: int | None  # as the client gave it or it was drawn; None when greedy
    truncate: int | None
    details: bool
    alternatives: bool
    full_text: bool


def native_options(request: GenerateRequest, settings: Settings, max_model_len: int, *, stream: bool) -> NativeOptions:
    """Check a request in LoRAX's order and words. Raises BadRequest.

    max_model_len: tokens of prompt and output together; LoRAX's `max_total_tokens`.
    """
    p = request.parameters or Parameters()
    best_of = _best_of(p, settings.max_choices, stream=stream)
    if stream and p.decoder_input_details:
        raise _bad("`decoder_input_details` == true is not supported when streaming tokens", "decoder_input_details")
    sampled = _is_sampled(p)
    _check_ranges(p)
    _check_sizes(p, settings, max_model_len)
    if not request.inputs:
        raise _bad("`inputs` cannot be empty", "inputs")
    if best_of > 1 and not sampled:
        raise _bad("you must use sampling when `best_of` is > 1", "best_of")
    if best_of > 1 and p.seed is not None:
        raise _bad("`seed` must not be set when `best_of` > 1", "seed")
    seed = secrets.randbits(_SEED_BITS) if p.seed is None else p.seed
    sampling = m.Sampling(
        temperature=_or(p.temperature, 1.0) if sampled else 0.0,
        top_p=_or(p.top_p, 1.0),
        top_k=p.top_k or 0,
        typical_p=_or(p.typical_p, 1.0),
        seed=seed % (1 << _SEED_BITS),
        repetition_penalty=_or(p.repetition_penalty, 1.0),
        frequency_penalty=_or(p.frequency_penalty, 0.0),
        presence_penalty=_or(p.presence_penalty, 0.0),
        penalties="lorax",
        watermark=p.watermark,
        num_logprobs=p.return_k_alternatives or 0,
        prompt_logprobs=p.decoder_input_details,
        logprobs_of="choice",
        ignore_eos=p.ignore_eos_token,
    )
    options = Options(
        sampling=sampling, n=best_of, max_tokens=p.max_new_tokens, default_tokens=UNLIMITED,
        stop=[stop for stop in p.stop or [] if stop], stop_token_ids=[], stream=stream, include_usage=False, echo=False,
        background=False, lora_scale=1.0, cls=INTERACTIVE,
        constraint=native_constraint(p.response_format, settings),
    )  # fmt: skip
    return NativeOptions(
        options=options,
        seed=seed if sampled else None,
        truncate=p.truncate,
        details=p.details or p.decoder_input_details,
        alternatives=p.return_k_alternatives is not None,
        full_text=bool(p.return_full_text),
    )


def _best_of(p: Parameters, limit: int, *, stream: bool) -> int:
    best_of = _or(p.best_of, 1)
    if not 0 < best_of <= limit:
        raise _bad(f"`best_of` must be > 0 and <= {limit}. Given: {best_of}", "best_of")
    if stream and best_of != 1:
        raise _bad("`best_of` != 1 is not supported when streaming tokens", "best_of")
    return best_of


def _is_sampled(p: Parameters) -> bool:
    """Tell whether tokens are drawn rather than the likeliest taken; a temperature of 0 always means the latter."""
    if p.temperature == 0:
        return False
    some = p.do_sample or (p.temperature is not None and p.temperature != 1) or p.top_k is not None
    return some or (p.top_p is not None and p.top_p < 1) or (p.typical_p is not None and p.typical_p < 1)


def _check_ranges(p: Parameters) -> None:
    if p.temperature is not None and p.temperature < 0:
        raise _bad("`temperature` must be non-negative", "temperature")
    if p.repetition_penalty is not None and p.repetition_penalty <= 0:
        raise _bad("`repetition_penalty` must be strictly positive", "repetition_penalty")
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(p, name)
        if value is not None and not -2 <= value <= 2:
            raise _bad(f"`{name}` must be >= -2.0 and <= 2.0", name)
    if p.top_p is not None and not 0 < p.top_p <= 1:
        raise _bad("`top_p` must be > 0.0 and < 1.0", "top_p")
    if p.typical_p is not None and not 0 < p.typical_p < 1:
        raise _bad("`typical_p` must be > 0.0 and < 1.0", "typical_p")


def _check_sizes(p: Parameters, settings: Settings, max_model_len: int) -> None:
    if p.top_k is not None and not 0 < p.top_k < 1 << 31:
        raise _bad("`top_k` must be strictly positive", "top_k")
    if p.return_k_alternatives is not None and p.return_k_alternatives <= 0:
        raise _bad("`return_k_alternatives` must be strictly positive", "return_k_alternatives")
    if p.return_k_alternatives is not None and p.return_k_alternatives > MAX_ALTERNATIVES:
        message = f"`return_k_alternatives` must be <= {MAX_ALTERNATIVES}. Given: {p.return_k_alternatives}"
        raise _bad(message, "return_k_alternatives")
    if p.max_new_tokens is not None and p.max_new_tokens <= 0:
        raise _bad("`max_new_tokens` must be strictly positive", "max_new_tokens")
    if p.max_new_tokens is not None and p.max_new_tokens > max_model_len:
        message = f"`max_new_tokens` must be <= {max_model_len}. Given: {p.max_new_tokens}"
        raise _bad(message, "max_new_tokens")
    num_stops = len(p.stop or [])
    if num_stops > settings.max_stop_strings:
        message = f"`stop` supports up to {settings.max_stop_strings} stop sequences. Given: {num_stops}"
        raise _bad(message, "stop")
    longest = max(map(len, p.stop or []), default=0)
    if longest > settings.max_stop_characters:
        raise _bad(
            f"a `stop` sequence may have at most {settings.max_stop_characters} characters. Given: {longest}", "stop"
        )
    if p.truncate is not None and not 0 < p.truncate < max_model_len:
        message = f"`truncate` must be strictly positive and less than {max_model_len}. Given: {p.truncate}"
        raise _bad(message, "truncate")


def native_limit(options: Options, num_prompt_tokens: int, max_model_len: int) -> int:
    """Return how many tokens may be made. Raises BadRequest when prompt and output do not fit."""
    if num_prompt_tokens >= max_model_len:
        raise _bad(f"`inputs` must have less than {max_model_len} tokens. Given: {num_prompt_tokens}", "inputs")
    room = max_model_len - num_prompt_tokens
    if options.max_tokens is None:
        return room
    if options.max_tokens > room:
        message = (
            f"`inputs` tokens + `max_new_tokens` must be <= {max_model_len}. "
            f"Given: {num_prompt_tokens} `inputs` tokens and {options.max_tokens} `max_new_tokens`"
        )
        raise _bad(message, "max_new_tokens")
    return options.max_tokens


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bad(message: str, param: str) -> BadRequest:
    return BadRequest(message, param=param)
