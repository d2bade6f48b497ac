"""A request, from the gateway to the queue, the scheduler and the worker."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import msgspec

from protocol.wire.messages.base import Task, Wire

SEED_BITS = 63
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that its multiples spread the seeds of the choices over all bits


class Sampling(Wire, frozen=True):
    """How tokens are sampled. The gateway has checked the ranges."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0  # always set by the gateway: the noise is a function of (seed, position)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 0  # number of last tokens of prompt and output that the penalty counts; 0: all
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []  # tokens that may be chosen; []: all
    bad_words: list[list[int]] = []  # sequences of tokens that may not occur in the output
    num_logprobs: int | None = None  # top logprobs per token besides the chosen one's; None: no logprobs; `WHOLE`: all
    logprob_token_ids: list[int] = []  # the `num_logprobs` tokens to list; []: the most likely ones
    min_tokens: int = 0
    ignore_eos: bool = False
    shows_special: bool = False  # special tokens are part of the text, also where stop strings are searched
    penalties: Literal["openai", "lorax"] = "openai"  # how frequency and presence count tokens, see `sampling._adjust_`
    watermark: bool = False
    prompt_logprobs: int | None = None  # number of top tokens per prompt token, in `Keys.plp`; None, `WHOLE`: as above
    logprobs_of: Literal["model", "choice"] = "model"  # of the model's own distribution, or of the one sampled from
    vocabulary: int = 0  # vocabulary size, where a number of logprobs is `WHOLE`
    stop_regex: list[str] = []  # expressions, see `protocol.wire.stop_regex`: the text ends at the first match

    def of_choice(self, index: int) -> Sampling:
        """Return the sampling of a prompt's choice, with its own seed: the client's for the first choice."""
        if not index:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + index * _GOLDEN) % (1 << SEED_BITS))


class Body(Wire, frozen=True):
    """What a worker needs to run the choices of a prompt; stored in `Keys.body`, see `protocol.queue.calls`.

    `task` decides what the request's log holds at the end. generate: int32 token ids. embed: the vector, float32
    [width]. classify: for each prompt token its int32 label and that label's float32 probability. score: the answering
    head's logits before any activation, float32 [labels]. That head is the adapter's own (`AdapterRecord.num_labels`)
    or else the base's. A reranker by yes and no has one logit: that of yes minus that of no.
    """

    prompt: bytes  # int32 little endian token ids
    sampling: Sampling
    max_new_tokens: int
    stop: list[str] = []
    stop_token_ids: list[int] = []
    salt: str = ""  # separates the prefix caches of tenants
    lora_scale: float = 1.0
    grammar: str = ""  # grammar of the output: llguidance's list of grammars as JSON; "": none
    task: Task = "generate"  # decides the content of the log, see above
    second: int = 0  # index of the first token of a pair's second text, of type id 1; 0: all have type id 0


EVERY_WORKER_KNOWS = frozenset({
    "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "num_logprobs", "min_tokens", "ignore_eos", "shows_special", "penalties",
    "watermark", "prompt_logprobs", "logprobs_of",
    "prompt", "sampling", "max_new_tokens", "stop", "stop_token_ids", "salt", "lora_scale", "grammar", "task",
})  # fmt: skip
"""The fields of `Sampling` and `Body` that every worker knows: those of the first version that reported known fields.

A field added later must not be listed here. It then counts as new: workers report that they know it, and a request that
uses it goes only to them, since other workers would ignore it and answer something else.
"""

SCORE: Task = "score"
"""A task that not every worker knows."""


@cache
def _new_of(kind: type[Wire]) -> dict[str, Any]:
    """Return the fields of a message type that not every worker knows, with their defaults."""
    return {
        field.name: field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        for field in msgspec.structs.fields(kind)
        if field.name not in EVERY_WORKER_KNOWS
    }


def fields_in_use(message: Wire) -> list[str]:
    """Return the names, fields and perhaps a task, that a request's worker must know to serve this message."""
    tasks = [SCORE] if isinstance(message, Body) and message.task == SCORE else []
    return tasks + [name for name, default in _new_of(type(message)).items() if getattr(message, name) != default]


KNOWN_FIELDS = sorted({*_new_of(Sampling), *_new_of(Body), SCORE})
"""The names that a worker of this version reports as known."""


class RequestHead(Wire, frozen=True):
    """What the scheduler needs to place a request; kept in the request's hash so that it can be queued again."""

    rid: str
    tenant: str
    cls: str
    digest: str  # "" for the base model
    num_prompt_tokens: int
    max_new_tokens: int
    deadline_ms: int  # unix time
    gateway: str  # gateway that gets the tokens; "": none (background jobs)
    stored: bool = False  # the request continues if its gateway is gone
    submitted_ms: int = 0
    prefix: str = ""  # hash of the prompt's first blocks, for prefix affinity
    weight: float = 1.0  # the tenant's share relative to those of other tenants
    choice: int = 0  # index among the choices of its prompt, see `Sampling.of_choice`
    call: str = ""  # rid of the first request of its call; "": this one. `Bus.submit` sets this field and the next
    part: int = 0  # index of its body among the call's bodies
    needs: list[str] = []  # names that its worker must know, see `fields_in_use`
    trace: str = ""  # W3C traceparent of the span that submitted it; "" without one
    num_virtual: int = 0  # virtual tokens that its adapter puts before its prompt
    base: str = ""  # name of its base

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens computed before the first output: its adapter's virtual tokens and its prompt."""
        return self.num_virtual + self.num_prompt_tokens
