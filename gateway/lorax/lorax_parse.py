"""*Parse* for LoRAX's native routes: convert a body to a `ParsedCall`. Pure.

Names, defaults, ranges and error messages are LoRAX's, so that its clients and their tests need no changes.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from gateway.auth.callers import Caller
from gateway.calls.parsed_call import CallOptions, Models, ParsedCall, Rules, Sent, Texts, Truncation
from gateway.grammars.notation import Constraint
from gateway.grammars.structured import native_constraint, tgi_constraint
from gateway.lorax.lorax_bodies import AdapterParameters, GenerateRequest, Parameters
from gateway.lorax.lorax_errors import GenerationFailed
from peft_adapters.recipe import MAX_MERGED
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError
from protocol.wire.messages.requests import SEED_BITS

MAX_ALTERNATIVES = 1000  # return_k_alternatives: each costs 8 bytes per token in the log


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A generation, and the parameters that concern only its answer."""

    call: ParsedCall
    prompt: str
    adapter_id: str  # id as given by the client
    seed: int | None  # the client's or a random one; None for greedy sampling
    details: bool
    alternatives: bool
    full_text: bool
    as_list: bool  # True: answer as a list, as `POST /` does


@dataclass(frozen=True, slots=True)
class NativeRules(Rules):
    """The checks of later stages, with LoRAX's error messages."""

    truncate: int | None = None

    def check_base(self, options: CallOptions, base: m.ServedModel) -> None:
        """Refuse values beyond the context, LoRAX's `max_total_tokens`. Raises BadRequest."""
        limit, truncate = base.max_model_len, self.truncate
        if options.max_tokens is not None and options.max_tokens > limit:
            raise _bad(f"`max_new_tokens` must be <= {limit}. Given: {options.max_tokens}", "max_new_tokens")
        if truncate is not None and not 0 < truncate < limit:
            raise _bad(f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}", "truncate")

    def refused_adapter(self, error: LorafleetError) -> LorafleetError:
        """Return a failed generation, which is LoRAX's error for an adapter that cannot be served."""
        return GenerationFailed(error)

    def empty_prompt(self) -> BadRequest:
        """Return the error for a prompt without tokens."""
        return _bad("`inputs` cannot be empty", self.param)

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return the maximum output tokens. Raises BadRequest if prompt and output do not fit the context."""
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


def parse(
    request: GenerateRequest, caller: Caller, settings: Settings, sent: Sent, *, stream: bool, as_list: bool = False
) -> NativeCall:
    """Return the call that a body describes, validated in LoRAX's order. Raises BadRequest."""
    p = request.parameters or Parameters()
    best_of = _best_of(p, settings.max_choices, stream=stream)
    if stream and p.decoder_input_details:
        raise _bad("`decoder_input_details` == true is not supported when streaming tokens", "decoder_input_details")
    sampled = _is_sampled(p)
    _check_ranges(p)
    _check_sizes(p, settings)
    if not request.inputs:
        raise _bad("`inputs` cannot be empty", "inputs")
    if best_of > 1 and not sampled:
        raise _bad("you must use sampling when `best_of` is > 1", "best_of")
    if best_of > 1 and p.seed is not None:
        raise _bad("`seed` must not be set when `best_of` > 1", "seed")
    seed = _drawn_seed(sent) if p.seed is None else p.seed
    options = CallOptions(
        sampling=_sampling(p, seed, sampled=sampled),
        n=best_of,
        max_tokens=p.max_new_tokens,
        stop=[stop for stop in p.stop or [] if stop],
        stream=stream,
        constraint=_constraint(p, settings),
        output="tokens",
    )
    truncation = None if p.truncate is None else Truncation(p.truncate)
    call = ParsedCall(
        caller,
        models_of(p),
        Texts([request.inputs], truncation),
        options,
        NativeRules("inputs", settings.max_choices, p.truncate),
        sent=sent if sent.key else None,
    )
    return NativeCall(
        call,
        prompt=request.inputs,
        adapter_id=p.adapter_id or ",".join(p.merged_adapters.ids if p.merged_adapters is not None else ()),
        seed=seed if sampled else None,
        details=p.details or p.decoder_input_details,
        alternatives=p.return_k_alternatives is not None,
        full_text=bool(p.return_full_text),
        as_list=as_list,
    )


def _drawn_seed(sent: Sent) -> int:
    """Return a random seed; with an Idempotency-Key a deterministic one, because answers contain it."""
    if not sent.key:
        return secrets.randbits(SEED_BITS)
    digest = hashlib.sha256(f"{sent.key}\0{sent.hash}".encode()).digest()
    return int.from_bytes(digest) % (1 << SEED_BITS)


def models_of(p: AdapterParameters) -> Models:
    """Return the requested models. Raises BadRequest for contradictions."""
    merged = p.merged_adapters
    if merged is not None:
        if p.adapter_id:
            raise _bad("at most one of `adapter_id` or `adapters` may be provided", "merged_adapters")
        if not merged.ids:
            raise _bad("at least one adapter ID must be provided when setting `adapters`", "merged_adapters")
        if len(merged.weights) != len(merged.ids):
            raise _bad("number of adapter IDs must match number of adapter weights", "merged_adapters")
        if len(merged.ids) > MAX_MERGED:
            message = f"merged_adapters: {len(merged.ids)} adapters; from 1 to {MAX_MERGED} can be merged"
            raise _bad(message, "merged_adapters")
    return Models([p.adapter_id or ""], p.adapter_source, merged, p.api_token or "")


def _sampling(p: Parameters, seed: int, *, sampled: bool) -> m.Sampling:
    return m.Sampling(
        temperature=_or(p.temperature, 1.0) if sampled else 0.0,
        top_p=_or(p.top_p, 1.0),
        top_k=p.top_k or 0,
        typical_p=_or(p.typical_p, 1.0),
        seed=seed % (1 << SEED_BITS),
        repetition_penalty=_or(p.repetition_penalty, 1.0),
        frequency_penalty=_or(p.frequency_penalty, 0.0),
        presence_penalty=_or(p.presence_penalty, 0.0),
        penalties="lorax",
        watermark=p.watermark,
        num_logprobs=p.return_k_alternatives or 0,
        prompt_logprobs=0 if p.decoder_input_details else None,
        logprobs_of="choice",
        ignore_eos=p.ignore_eos_token,
    )


def _constraint(p: Parameters, settings: Settings) -> Constraint | None:
    if p.grammar is not None and p.response_format is not None:
        raise _bad("`grammar` and `response_format` cannot be used together", "grammar")
    if p.grammar is not None:
        return tgi_constraint(p.grammar, "grammar", settings)
    return native_constraint(p.response_format, settings)


def _best_of(p: Parameters, limit: int, *, stream: bool) -> int:
    best_of = _or(p.best_of, 1)
    if not 0 < best_of <= limit:
        raise _bad(f"`best_of` must be > 0 and <= {limit}. Given: {best_of}", "best_of")
    if stream and best_of != 1:
        raise _bad("`best_of` != 1 is not supported when streaming tokens", "best_of")
    return best_of


def _is_sampled(p: Parameters) -> bool:
    """Return whether tokens are sampled; otherwise decoding is greedy, as always with a temperature of 0."""
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


def _check_sizes(p: Parameters, settings: Settings) -> None:
    if p.top_k is not None and not 0 < p.top_k < 1 << 31:
        raise _bad("`top_k` must be strictly positive", "top_k")
    if p.return_k_alternatives is not None and p.return_k_alternatives <= 0:
        raise _bad("`return_k_alternatives` must be strictly positive", "return_k_alternatives")
    if p.return_k_alternatives is not None and p.return_k_alternatives > MAX_ALTERNATIVES:
        message = f"`return_k_alternatives` must be <= {MAX_ALTERNATIVES}. Given: {p.return_k_alternatives}"
        raise _bad(message, "return_k_alternatives")
    if p.max_new_tokens is not None and p.max_new_tokens <= 0:
        raise _bad("`max_new_tokens` must be strictly positive", "max_new_tokens")
    num_stops = len(p.stop or [])
    if num_stops > settings.max_stop_strings:
        message = f"`stop` supports up to {settings.max_stop_strings} stop sequences. Given: {num_stops}"
        raise _bad(message, "stop")
    longest = max(map(len, p.stop or []), default=0)
    if longest > settings.max_stop_characters:
        raise _bad(
            f"a `stop` sequence may have at most {settings.max_stop_characters} characters. Given: {longest}", "stop"
        )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bad(message: str, param: str) -> BadRequest:
    return BadRequest(message, param=param)
