"""*Parse*, the first stage: the request in a body of any API, checked as far as possible without model and tokenizer.

Every API has its own `parse`, which returns a `ParsedCall`; all later stages are shared. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from gateway.adapters.merged import MergedAdapters
from gateway.auth.callers import Caller
from gateway.auth.limits import limit_headers
from gateway.bodies.json_slices import rows_of
from gateway.grammars.notation import Constraint
from gateway.text.answer_form import AnswerForm
from gateway.tools.definitions import Tools
from protocol.queue.books.quota import Standing
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError
from protocol.wire.keys import BATCH, INTERACTIVE

UNLIMITED = 1 << 31  # output tokens: more than any context

Source = str | list[int]
"""A prompt as a text, or as token ids."""


class CallOptions(msgspec.Struct, frozen=True):
    """The parameters of a call. A struct, as are all objects made per call: a frozen dataclass is ten times as slow."""

    sampling: m.Sampling  # its seed is the one of choice 0
    n: int = 1  # choices per prompt
    max_tokens: int | None = None  # None: `default_tokens`, or what the context has room for
    default_tokens: int = UNLIMITED
    stop: list[str] = []
    stop_token_ids: list[int] = []
    bad_words: list[str] = []  # none is empty
    stream: bool = False
    include_usage: bool = False
    includes_stop: bool = False  # the text includes the stop string or the end token's text
    running_usage: bool = False  # every chunk reports the usage so far
    echo: bool = False
    background: bool = False
    cls: str = INTERACTIVE
    lora_scale: float | None = None  # None: 1
    constraint: Constraint | None = None  # constraint on the output's form
    tools: Tools | None = None  # tools that the model may call
    max_thought: int | None = None  # maximum reasoning tokens, if the model's can be bounded; None: no limit
    num_best: int = 0  # best_of: show only this many of a prompt's n choices, by mean logprob; 0: all
    num_shown: int | None = None  # most likely tokens shown beside each of the output; None: no logprobs are shown
    num_shown_of_prompt: int | None = None  # the same for the prompt's tokens, besides those shown by `echo`
    shows_ids: bool = False  # the answer includes the token ids of output and prompt
    names_ids: bool = False  # logprobs name tokens by their ids
    shows_metrics: bool = False  # the answer reports timings
    hides_reasoning: bool = False  # the model's reasoning is left out of the answer
    scores_only: bool = False  # no output tokens, only the logprobs of the prompt
    by_token: bool = False  # one piece per token, so that replayed events are identical
    output: Literal["text", "tokens", "numbers"] = "text"
    """What choices collect: text up to its end, every token with its logprob, or an encoder's numbers."""

    @property
    def record_bytes(self) -> int:
        """Size of a token's logprob record, 0 without logprobs."""
        num = self.sampling.num_logprobs
        return 0 if num is None else m.logprob_record_bytes(num, self.sampling.vocabulary)

    @property
    def prompt_record_bytes(self) -> int:
        """Size of a prompt token's logprob record, 0 without such logprobs."""
        num = self.sampling.prompt_logprobs
        return 0 if num is None else m.prompt_record_bytes(num, self.sampling.vocabulary)

    @property
    def rows(self) -> int:
        """Tokens whose logprobs are converted to JSON and written at a time."""
        sampling = self.sampling
        return rows_of(1 + max(sampling.num_logprobs or 0, sampling.prompt_logprobs or 0, sampling.vocabulary))

    @property
    def is_empty(self) -> bool:
        """Whether no output token is requested, so that nothing has to be submitted."""
        return self.max_tokens == 0


class Models(msgspec.Struct, frozen=True):
    """The requested models: the base or adapters by name, or an adapter merged from others for this call."""

    names: Sequence[str]  # each has its own choices
    source: str | None = None  # LoRAX's name of the source: hub, local or s3
    merged: MergedAdapters | None = None
    token: str = ""  # access token for the source; "": the caller's
    adapter: str = ""  # adapter that replaces the base in `names`; "": none


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt that is too long is shortened."""

    num: int | None  # tokens kept; None: as many as fit beside the longest output
    keeps_first: bool = False  # keeps the first tokens instead of the last
    drops_messages: bool = False  # True: whole messages are dropped from a conversation, earliest first

    def limit(self, max_model_len: int, max_tokens: int | None) -> int:
        """Return the maximum number of prompt tokens kept."""
        return max(max_model_len - (max_tokens or 1), 1) if self.num is None else self.num

    def cut(self, ids: list[int], limit: int) -> list[int]:
        """Return the ids that are kept."""
        return ids[:limit] if self.keeps_first else ids[-limit:]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """One prompt, which the chat template renders from messages."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)  # template variables besides the messages
    add_generation_prompt: bool = True
    continue_final: bool = False  # True: the answer continues the last message, which is the assistant's
    add_special_tokens: bool = False  # besides those that the template writes
    truncation: Truncation | None = None
    echoes: bool = False  # answers begin with the last message's text, if it is the assistant's
    left_out: Sequence[str] = ()  # body paths of content that messages replace by a text


class Texts(msgspec.Struct, frozen=True):
    """Prompts as texts or token ids."""

    sources: Sequence[Source]
    truncation: Truncation | None = None
    with_offsets: bool = False  # True: token offsets are requested, see `Prompt.offsets`
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of texts to be scored: each pair is a prompt for a cross-encoder.

    For an embedding model each text is a prompt: all firsts, then all seconds.
    """

    firsts: Sequence[str]  # one text for all pairs, or one per pair
    seconds: Sequence[str]  # second text of each pair
    most_tokens: int  # maximum total tokens; a first text counts in each of its pairs
    most_second: int | None = None  # tokens kept of each second text; None: all
    apart: bool = False  # each text is a prompt of its own

    @property
    def sources(self) -> Sequence[str]:
        """One entry per prompt: a pair's second text, or each text if `apart`."""
        return [*self.firsts, *self.seconds] if self.apart else self.seconds

    @property
    def texts(self) -> list[tuple[str, str]]:
        """The pairs, each as (first, second)."""
        firsts = [self.firsts[0]] * len(self.seconds) if len(self.firsts) == 1 else self.firsts
        return list(zip(firsts, self.seconds, strict=True))


@dataclass(frozen=True, slots=True)
class Rules:
    """The checks of later stages, with an API's wording of errors. These are OpenAI's; other APIs override some."""

    param: str  # the field that the prompts come from
    max_choices: int

    def check_number(self, num_models: int, num_prompts: int, n: int) -> None:
        """Refuse too many choices before any name is resolved or text tokenized. Raises BadRequest."""
        if not num_prompts:
            raise BadRequest(f"{self.param} is an empty list", param=self.param)
        if num_models * num_prompts * n > self.max_choices:
            asked = f"{num_prompts} prompts for {num_models} models with n = {n}"
            raise BadRequest(f"{asked}; the limit is {self.max_choices} choices", param="n")

    def check_total(self, num_tokens: int, limit: int) -> None:
        """Refuse a call whose choices have too many prompt tokens in total. Raises BadRequest."""
        if num_tokens > limit:
            message = f"the prompts of all choices have {num_tokens} tokens in total; the limit per call is {limit}"
            raise BadRequest(message, param=self.param, code="limit_exceeded")

    def check_base(self, options: CallOptions, base: m.ServedModel) -> None:
        """Refuse options that the base model does not support. Raises BadRequest."""

    def check_apart(self) -> None:
        """Refuse options that do not apply if both texts of a pair are prompts. Raises BadRequest."""

    def check_form(self, form: AnswerForm | None) -> Sequence[str]:
        """Return the parameters that the model's template ignores.

        Raises BadRequest for those that it cannot ignore.
        """
        return ()

    def refused_adapter(self, error: LorafleetError) -> LorafleetError:
        """Return the error for an adapter that cannot be served."""
        return error

    def empty_prompt(self) -> BadRequest:
        """Return the error for a prompt without tokens."""
        return BadRequest(f"a {self.param} is empty", param=self.param)

    def limit_headers(self, standing: Standing) -> dict[str, str]:
        """Return the headers that report the tenant's remaining limits."""
        return limit_headers(standing)

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return a choice's maximum output tokens. Raises BadRequest if prompt and output do not fit the context."""
        room, wanted = max_model_len - num_prompt_tokens, options.max_tokens
        if wanted is not None and wanted >= max_model_len:  # too many for any prompt
            message = (
                f"This model's maximum context length is {max_model_len} tokens, those of the prompt among them. "
                f"However, max_tokens is {wanted}. Please reduce it, or leave it out."
            )
            raise BadRequest(message, param="max_tokens", code="context_length_exceeded")
        if room < (1 if wanted is None else min(wanted, 1)):
            message = (
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
                f"{num_prompt_tokens} tokens. Please reduce the length of the prompt."
            )
            raise BadRequest(message, param=self.param, code="context_length_exceeded")
        if wanted is not None and wanted > room:
            message = (
                f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt, {wanted} in the completion). "
                "Please reduce the length of the prompt or max_tokens."
            )
            raise BadRequest(message, param=self.param, code="context_length_exceeded")
        limit = min(room, options.default_tokens) if wanted is None else wanted
        if options.sampling.min_tokens > limit:
            message = f"min_tokens is {options.sampling.min_tokens}; this request may have at most {limit} tokens"
            raise BadRequest(message, param="min_tokens")
        return limit


@dataclass(frozen=True, slots=True)
class Sent:
    """A body as received: Idempotency-Keys compare its hash, and jobs store it."""

    endpoint: str
    raw: bytes
    key: str = ""  # the Idempotency-Key, "" for none
    request_id: str = ""  # the X-Request-Id, "" for none
    known_hash: str = ""  # hash of a body that is no longer in memory

    @property
    def hash(self) -> str:
        """SHA-256 of endpoint and body, in hex."""
        return self.known_hash or hashlib.sha256(self.endpoint.encode() + b"\0" + self.raw).hexdigest()


class ParsedCall(msgspec.Struct, frozen=True):
    """A parsed request, independent of the API."""

    caller: Caller
    models: Models
    inputs: ChatPrompt | Texts | Pairs
    options: CallOptions
    rules: Rules
    task: m.Task = "generate"  # pairs: "score" until the base is known to compute embeddings
    model_name: str = ""  # model name in the answer
    names_each: bool = False  # every choice names its model
    form_param: str = "response_format"  # the field that constrains the output, for errors
    metadata: Mapping[str, str] = {}  # metadata of a job
    answer_id: str = ""  # suffix of the answer's id; "": a new one
    call_id: str = ""  # id of the call; "": assigned when it is submitted
    shown: Mapping[str, Any] = {}  # fields of the body that the answer repeats
    left_out: Sequence[str] = ()  # body paths of ignored parameters, for the answer's headers
    cache_salt: str = ""  # separates prefix cache entries, in addition to the tenant
    sent: Sent | None = None

    @property
    def sources(self) -> Sequence[Source]:
        """The prompts that each model answers; one placeholder for a conversation, whose prompt is not rendered yet."""
        return [""] if isinstance(self.inputs, ChatPrompt) else self.inputs.sources

    @property
    def cls(self) -> str:
        """The class of the call's requests."""
        return BATCH if self.caller.is_batch else self.options.cls

    @property
    def key(self) -> str:
        """The Idempotency-Key, "" for none."""
        return self.sent.key if self.sent is not None else ""

    @property
    def salt(self) -> str:
        """Salt of the call's prefix cache entries: the tenant, and the call's own salt."""
        return f"{self.caller.name}\0{self.cache_salt}" if self.cache_salt else self.caller.name

    @property
    def is_kept(self) -> bool:
        """Whether its results outlive the client's connection: a job, a stored response, or an Idempotency-Key."""
        return self.options.background or bool(self.key or self.shown.get("store"))

    @property
    def served_without(self) -> Sequence[str]:
        """Body paths of ignored parameters, for the answer's headers."""
        unread = self.inputs.left_out if isinstance(self.inputs, ChatPrompt) else ()
        tools = self.options.tools
        return [*self.left_out, *unread, *(tools.not_held if tools is not None else ())]

    def without_prompts(self) -> ParsedCall:
        """Return the call without its prompts' texts and body, so that they can be freed once it is tokenized."""
        inputs, sent = self.inputs, None
        inputs = ChatPrompt([]) if isinstance(inputs, ChatPrompt) else Texts([""] * len(inputs.sources))
        if self.sent is not None and self.sent.key:
            sent = Sent(self.sent.endpoint, b"", self.sent.key, known_hash=self.sent.hash)
        return msgspec.structs.replace(self, inputs=inputs, sent=sent)
