"""Gateway to queue, scheduler and worker: a request."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import msgspec

from protocol.wire.messages.base import Task, Wire

SEED_BITS = 63
_GOLDEN = 0x9E3779B97F4A7C15  # odd: multiples of it spread the seeds of the choices over all bits


class Sampling(Wire, frozen=True):
    """How tokens are chosen. The gateway has checked the ranges."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0  # always set by the gateway: noise is a function of (seed, position)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 0  # last tokens of prompt and output that it counts; 0: all
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []  # tokens that may be chosen; []: all
    bad_words: list[list[int]] = []  # sequences of tokens that may not occur in the output
    num_logprobs: int | None = None  # top logprobs per token besides the chosen one's; None: no logprobs; `WHOLE`: all
    logprob_token_ids: list[int] = []  # the `num_logprobs` tokens listed in place of the most likely ones; []: those
    min_tokens: int = 0
    ignore_eos: bool = False
    shows_special: bool = False  # special tokens are text, in which stop strings are found too
    penalties: Literal["openai", "lorax"] = "openai"  # counts for frequency and presence, see `sampling._adjust_`
    watermark: bool = False
    prompt_logprobs: int | None = None  # number of most likely tokens at each prompt token, for `Keys.plp`; as before
    logprobs_of: Literal["model", "choice"] = "model"  # the model's own distribution, or the one drawn from
    vocabulary: int = 0  # number of tokens whose logprobs are listed, by id, where that of likely ones is `WHOLE`
    stop_regex: list[str] = []  # expressions, see `protocol.wire.stop_regex`: the text ends where one matches

    def of_choice(self, index: int) -> Sampling:
        """Return how a prompt's choice is sampled: by a seed of its own. The first keeps the client's, whatever n."""
        if not index:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + index * _GOLDEN) % (1 << SEED_BITS))


class Body(Wire, frozen=True):
    """What a worker needs to run the choices of a prompt; lives in `Keys.body`, see `protocol.queue.calls`.

    What the request's log holds in the end depends on the task. generate: int32 token ids. embed: float32 [width], the
    vector. classify: for each prompt token its int32 label and the label's float32 probability. score: float32
    [labels], the logits of the head before any activation, as many as the head has that answers: the adapter's own
    (`AdapterRecord.num_labels`), else the base's; a reranker by yes and no has one, the logit of yes less that of no.
    """

    prompt: bytes  # int32 little endian token ids
    sampling: Sampling
    max_new_tokens: int
    stop: list[str] = []
    stop_token_ids: list[int] = []
    salt: str = ""  # separates the prefix caches of tenants
    lora_scale: float = 1.0
    grammar: str = ""  # grammar of the output: llguidance's list of grammars as JSON; "": none
    task: Task = "generate"  # content of the log, see below
    second: int = 0  # index of the first token of the second text of a pair, whose type id is 1; 0: all are of type 0


EVERY_WORKER_KNOWS = frozenset({
    "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "num_logprobs", "min_tokens", "ignore_eos", "shows_special", "penalties",
    "watermark", "prompt_logprobs", "logprobs_of",
    "prompt", "sampling", "max_new_tokens", "stop", "stop_token_ids", "salt", "lora_scale", "grammar", "task",
})  # fmt: skip
"""The fields of `Sampling` and `Body` that workers know without saying so: those of the first version that is asked.

A field that is added later is not entered here. It counts as new by itself: workers report that they know it, and a
request that uses it goes only to them, since others would ignore it and answer something else.
"""

SCORE: Task = "score"
"""The task that not every worker knows."""


@cache
def _new_of(kind: type[Wire]) -> dict[str, Any]:
    """Return the fields of a message that not every worker knows, with their defaults."""
    return {
        field.name: field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        for field in msgspec.structs.fields(kind)
        if field.name not in EVERY_WORKER_KNOWS
    }


def fields_in_use(message: Wire) -> list[str]:
    """Return the fields of a message, and the task, by which a request needs a worker that knows them."""
    tasks = [SCORE] if isinstance(message, Body) and message.task == SCORE else []
    return tasks + [name for name, default in _new_of(type(message)).items() if getattr(message, name) != default]


KNOWN_FIELDS = sorted({*_new_of(Sampling), *_new_of(Body), SCORE})
"""What a worker of this version says that it knows."""


class RequestHead(Wire, frozen=True):
    """What a scheduler needs to place a request; also kept in the request's hash to queue it again."""

    rid: str
    tenant: str
    cls: str
    digest: str  # "" for the base model
    num_prompt_tokens: int
    max_new_tokens: int
    deadline_ms: int  # unix time
    gateway: str  # gateway that gets the tokens; "": none (background jobs)
    stored: bool = False  # lives on without its gateway
    submitted_ms: int = 0
    prefix: str = ""  # hash of the prompt's first blocks, for prefix affinity
    weight: float = 1.0  # the tenant's share relative to others
    choice: int = 0  # choice of its prompt, see `Sampling.of_choice`
    call: str = ""  # first request of its call; "": itself. This and the next are set by `Bus.submit`
    part: int = 0  # index of its body among the call's
    needs: list[str] = []  # fields that its worker must know, see `fields_in_use`
    trace: str = ""  # W3C traceparent of the span that submitted it; "" without one
    num_virtual: int = 0  # virtual tokens that its adapter puts before its prompt
    base: str = ""  # name of its base

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that are computed before its output: its adapter's virtual tokens and its prompt."""
        return self.num_virtual + self.num_prompt_tokens
