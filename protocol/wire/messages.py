"""The wire types, one section per edge. msgpack by msgspec: unknown fields are ignored, new fields get defaults.

Types on the per-token path are `array_like`: fields are added at their end only.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]
Task = Literal["generate", "embed", "classify"]
"""What a request wants, and what a base model does: text, an embedding, or the labels of its tokens."""
TERMINAL = ("completed", "failed", "cancelled")
"""Values of a request's `state` that never change again; before them it is `queued` or `assigned`."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of messages sent once per request or less."""


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """Base of messages sent per step."""


# ---------------------------------------------------------------- gateway -> everyone: a request


class Sampling(Wire, frozen=True):
    """How tokens are chosen. Ranges are checked by the gateway."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0  # always set by the gateway: noise is a function of (seed, position)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    num_logprobs: int | None = None  # top logprobs per token besides the chosen one's; None: no logprobs at all
    min_tokens: int = 0
    ignore_eos: bool = False
    penalties: Literal["openai", "lorax"] = "openai"  # what frequency and presence count, see `sampling._adjust_`
    watermark: bool = False
    prompt_logprobs: bool = False  # those of the prompt's tokens too, `num_logprobs` of each; into `Keys.plp`
    logprobs_of: Literal["model", "choice"] = "model"  # the model's own distribution, or the one drawn from


class Body(Wire, frozen=True):
    """What a worker needs to run a request; lives in `Keys.body`."""

    prompt: bytes  # int32 little endian token ids
    sampling: Sampling
    max_new_tokens: int
    stop: list[str] = []
    stop_token_ids: list[int] = []
    salt: str = ""  # separates the prefix caches of tenants
    lora_scale: float = 1.0
    grammar: str = ""  # that the output must follow: llguidance's list of grammars as JSON; "": none
    task: Task = "generate"  # embed: the log becomes float32 [width]; classify: per prompt token (int32 label, float32)


class Submit(Wire, frozen=True):
    """What a scheduler needs to place a request; also kept in the request's hash to queue it again."""

    rid: str
    tenant: str
    cls: str
    digest: str  # "" for the base model
    num_prompt_tokens: int
    max_new_tokens: int
    deadline_ms: int  # unix time
    gateway: str  # who gets the tokens; "" when nobody listens (background jobs)
    stored: bool = False  # lives on without its gateway
    submitted_ms: int = 0
    prefix: str = ""  # hash of the prompt's first blocks, for prefix affinity
    weight: float = 1.0  # the tenant's share relative to others


# ---------------------------------------------------------------- scheduler -> worker


class Assigned(Packed, frozen=True):
    """One request of an assignment."""

    rid: str
    epoch: int
    digest: str
    tenant: str = ""
    gateway: str = ""
    stored: bool = False
    deadline_ms: int = 0
    yields: bool = False  # its tenant has more than its fair share: it yields to requests of tenants that have less


class Control(Wire, frozen=True):
    """An order to one worker."""

    kind: Literal["cancel", "drain", "prefetch", "pin", "unpin", "evict", "queued"]
    rid: str = ""
    digest: str = ""
    digests: list[str] = []  # of `queued`: adapters that requests wait for, which should not leave meanwhile
    order: str = ""  # of `evict`: repeated in the event that answers it


# ---------------------------------------------------------------- worker -> gateway


class Usage(Packed, frozen=True):
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class Delta(Packed, frozen=True):
    """New tokens of one request, and its end. `seq0` is the index of the first id in the request's log.

    `seq0 == -1` marks an end that was not written by the owner: the log holds whatever the reader has not seen.
    """

    rid: str
    epoch: int
    seq0: int
    ids: bytes = b""  # int32
    logprobs: bytes = b""  # `logprob_record_bytes` per id
    finish: str = ""  # FinishReason or "" while running
    error: str = ""  # JSON of `ErrorInfo` when finish == "error"
    usage: Usage | None = None
    note: str = ""  # state for a waiting client, such as "loading adapter"
    stop: str = ""  # the stop string that ended it, if one did


class ErrorInfo(Wire, frozen=True):
    """A `LorafleetError` on the wire."""

    message: str
    status: int = 500
    type: str = "server_error"
    code: str | None = None
    param: str | None = None


def logprob_record_bytes(num_logprobs: int) -> int:
    """Size of a token's record: its float32 logprob, then `num_logprobs` pairs (int32 id, float32 logprob)."""
    return 4 + 8 * num_logprobs


# ---------------------------------------------------------------- worker -> scheduler


class Ended(Packed, frozen=True):
    """A request left its worker: finished, or handed back (`requeued`). `wid` is "" for an end from outside."""

    rid: str
    wid: str
    epoch: int
    tenant: str
    num_output_tokens: int
    requeued: bool = False


class StepModel(Wire, frozen=True):
    """Seconds of a step = a + b·tokens + c·kv_tokens + d·(sum of ranks over distinct adapters), fitted online."""

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0

    def seconds(self, num_tokens: int, num_kv_tokens: int, sum_ranks: int) -> float:
        """Return how long a step of so much takes."""
        return self.a + self.b * num_tokens + self.c * num_kv_tokens + self.d * sum_ranks

    def is_worth_a_step(self, num_tokens: int, num_kv_tokens: int) -> bool:
        """Tell whether so much makes a step longer by more than what a step takes that does next to nothing."""
        return self.b * num_tokens + self.c * num_kv_tokens > self.a


class WorkerCounters(msgspec.Struct, omit_defaults=True):
    """Totals since a worker's start. The worker adds to its own; a beat carries a copy."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0  # of prompts and outputs, recomputed ones too
    num_cached_tokens: int = 0  # found in the prefix cache instead
    num_output_tokens: int = 0
    num_drafted_tokens: int = 0  # guesses computed
    num_accepted_tokens: int = 0  # of them, those that were right
    num_evictions: int = 0  # adapters that left the pool for others
    plan_s: float = 0.0  # choosing the tokens of the step, moving adapters along
    inputs_s: float = 0.0  # building and sending the work lists
    forward_s: float = 0.0
    sample_s: float = 0.0
    mask_s: float = 0.0  # of it, finding out which tokens grammars allow
    finish_s: float = 0.0  # stop checks and outputs
    publish_s: float = 0.0  # making steps durable and visible, while the next ones are computed


class WorkerBeat(Wire, frozen=True):
    """A worker's state, once a second and on change."""

    wid: str  # unique per process start
    name: str  # stable across restarts: a new wid with the same name means the old one is gone
    model: str
    capacity: int  # requests it would hold at once
    max_step_tokens: int = 0  # tokens of prompts and outputs that one step takes at most
    running: int = 0
    waiting: int = 0
    waiting_adapter: int = 0  # of `waiting`, those whose adapter is on its way; they take no capacity
    progress: list[tuple[str, int]] = []  # (rid, output tokens so far) of all requests it holds
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    pool_bytes_free: int = 0
    pool_bytes_total: int = 0
    step_ms: float = 0.0
    tokens_per_s: float = 0.0
    step_model: StepModel = StepModel()
    resident: list[str] = []
    loading: list[str] = []
    host: list[str] = []
    pinned: dict[str, str] = {}  # digest that is to stay in the pool -> why it is not there, "" if it is, or comes
    num_loads: int = 0  # adapters copied into the pool since its start
    num_fetches: int = 0  # adapters fetched from a store
    counters: WorkerCounters = msgspec.field(default_factory=WorkerCounters)
    draining: bool = False
    version: str = ""
    sent_ms: int = 0


class SchedulerStatus(Wire, frozen=True):
    """The leader's view, for admission, job positions and metrics."""

    queued: int
    running: int
    workers: int
    drain_rate: float  # requests finished per second while others waited; 0: not known yet
    queued_tokens: int = 0
    queued_batch: int = 0  # of `queued`, those of class batch
    sent_ms: int = 0


class Death(Packed, frozen=True):
    """A worker's death under a request. Times are unix milliseconds."""

    wid: str
    name: str  # the worker's, "" if nobody knew it any more
    ms: int  # when it was noticed
    assigned_ms: int
    num_output_tokens: int  # of the request's log at the death
    num_at_start: int  # and when the worker got it

    @property
    def phase(self) -> str:
        """`prefill` until a token has come of it there: adapter, prompt, or its very next token."""
        return "decode" if self.num_output_tokens > self.num_at_start else "prefill"


class DeadLetter(Wire, frozen=True):
    """What could not be served or not even be read, and why."""

    reason: str
    stream: str = ""  # where an unreadable message lay
    raw: bytes = b""  # that message
    submit: Submit | None = None
    attempts: int = 0
    num_output_tokens: int = 0
    deaths: list[Death] = []  # workers that died under it, oldest first
    ms: int = 0


# ---------------------------------------------------------------- the base model, published by workers


OPAQUE = "opaque"
"""Kind of a linear layer that can only be called, such as a quantised one: adapters add to it, and do nothing else."""


class SiteShape(Packed, frozen=True):
    """A part of the model that an adapter can change, as the model names it."""

    name: str  # "model.layers.0.self_attn.q_proj"; of a parameter with the parameter: "….mlp.experts.gate_up_proj"
    in_features: int  # of an embedding: its entries; of a norm: its width
    out_features: int
    kind: Literal["linear", "conv1d", "opaque", "embedding", "norm", "parameter"] = "linear"  # opaque: see `OPAQUE`
    has_bias: bool = False
    num_experts: int = 0  # of a parameter: matrices in it


class ServedModel(Wire, frozen=True):
    """What the fleet serves: enough to validate requests and adapters without the weights."""

    model: str  # as given to the worker
    name: str  # served name
    fingerprint: str  # of config and weight layout; workers with another one refuse to join
    model_type: str
    vocab_size: int
    max_model_len: int  # tokens of prompt + output that a worker's cache can hold
    sites: list[SiteShape]
    dtype: str = ""
    tied_embeddings: bool = False
    created_ms: int = 0
    device: str = ""  # "cpu" or "cuda"
    task: Task = "generate"
    labels: list[str] = []  # of `classify`, by index
    width: int = 0  # of `embed`: entries of a vector
    unit_length: bool = False  # and whether it has length 1


# ---------------------------------------------------------------- adapters, published by the store

AdapterState = Literal["unknown", "downloading", "on_disk", "failed"]


class Alias(Wire, frozen=True):
    """A name and what it stands for now."""

    name: str
    state: AdapterState
    digest: str = ""
    source: str = ""  # "local:NAME", "hub:ORG/NAME@COMMIT", "s3://BUCKET/PREFIX"
    reason: str = ""  # why it failed
    tenant: str = ""  # "": everybody's
    created_ms: int = 0
    changed_ms: int = 0
    status: int = 0  # HTTP status of the reason, if it failed
    retry_ms: int = 0  # when a failure may be tried again, unix time
    asked_ms: int = 0  # of the registration that the last look at its source was for
    on_request: bool = False  # a request named the source itself
    registered: str = ""  # the registration's source, of which `source` is what was found there

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder under the adapter root, under its own name."""
        return not self.tenant and self.source == f"local:{self.name}"


class Registration(Wire, frozen=True):
    """A name that is to be served from a remote source until it is taken back; stores make it true."""

    name: str
    source: str  # `Reference.source`
    token: str = ""  # for the source, sealed by `FleetSecret`; "": the store's own
    tenant: str = ""  # who sees the name; "": everybody
    asked_ms: int = 0  # when it was last asked for: a look at the source before that is out of date
    on_request: bool = False  # a request named the source itself


class AdapterRecord(Wire, frozen=True):
    """The facts of one adapter content."""

    digest: str
    rank: int  # largest of its sites
    num_bytes: int
    config: dict[str, Any]  # canonical adapter_config
    modules: list[str]  # kinds of sites touched, such as "q_proj"
    source: str
    created_ms: int
    vocab_size: int = 0  # tokens it knows, 0: those of the base


class AdapterEvent(Wire, frozen=True):
    """Something happened to an adapter. Events, not work: losing one costs time, never correctness.

    Gateways say that a name is `wanted`; stores speak of names; workers speak of digests, without a name.
    """

    kind: Literal["wanted", "staged", "resident", "evicted", "failed", "alias", "removed"]
    digest: str = ""
    name: str = ""
    source: str = ""  # wid or sid
    reason: str = ""
    ms: float = 0.0  # what it took
    order: str = ""  # of an `evicted` that an order asked for
    pool_bytes: int = 0  # taken or freed in a worker's pool
    host_bytes: int = 0  # and in its host memory


# ---------------------------------------------------------------- jobs


class Job(Wire, frozen=True):
    """A background request: which requests it is made of, and how its result is written."""

    jid: str
    endpoint: str
    tenant: str
    model: str  # as the client named it
    created_ms: int
    expires_ms: int
    rids: list[str]
    request: dict[str, Any]  # the HTTP body, to build the result as the endpoint would
    metadata: dict[str, str] = {}
    digests: list[str] = []  # of the adapters that answer, "" for the base model
    texts: list[str] = []  # of each, the hash of the tokenizer and template it brings, "" if none
    opened: list[bool] = []  # of each, whether its prompt ends within the model's reasoning


class Idempotent(Wire, frozen=True):
    """What an Idempotency-Key was first used for, so that a repetition finds the same requests."""

    body_hash: str  # sha256 of endpoint and HTTP body
    created_ms: int
    rids: list[str]
    digests: list[str] = []  # of the adapters that answer, "" for the base model
    texts: list[str] = []  # of each, the hash of the tokenizer and template it brings, "" if none
    jid: str = ""  # of a background job
    opened: list[bool] = []  # as in `Job`


encode = msgspec.msgpack.Encoder().encode
"""Encode any message."""
