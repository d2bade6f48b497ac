"""Every setting of the fleet, declared once: `common_settings.py` has those of every service, this module the others.

A flag overrides a `LORAFLEET_*` variable, and a variable overrides the TOML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from protocol.runtime.common_settings import CommonSettings

BLOCK_TOKENS = 16
"""Tokens per KV cache block."""

DRAFT_TOKENS = 8
"""Maximum draft tokens per sequence and step, if there is a draft model and `max_draft_tokens` is 0."""


class Settings(CommonSettings):
    """The settings of all services; each reads those that it needs. Names include the unit.

    Order matters: `--help` groups the fields by `SECTIONS` of `lorafleet/shared/flags.py`.
    """

    # Gateway
    host: str = Field(default="127.0.0.1", description="address that the gateway listens on")
    port: int = Field(default=8000, ge=0, le=65535, description="the gateway's port; 0: any free one (`up` only)")
    api_keys: bool = Field(
        default=False,
        description="require API keys (see `lorafleet keys`); otherwise anyone who reaches it has full access",
    )
    console_keys: bool = Field(
        default=False, description="let operators create, limit and revoke API keys over HTTP and in the console"
    )
    open_pages: bool = Field(
        default=False,
        description="with API keys: serve /metrics and /openapi.json without one (/metrics then needs no scope admin)",
    )
    allowed_hosts: str = Field(
        default="",
        description="without API keys: comma-separated host names that clients may use for the gateway, besides this "
        "machine's; *: any",
    )
    unknown_parameters: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="response to unknown or unsupported request parameters: a 400, or a header and a log line",
    )
    hosted_tools: Literal["leave_out", "refuse"] = Field(
        default="leave_out", description="handling of tools hosted by OpenAI or Anthropic: left out, or a 400"
    )
    force_include_usage: bool = Field(default=False, description="report usage in every chunk of OpenAI's streams")
    per_request_metrics: bool = Field(default=False, description="chats and completions report their timings: metrics")
    return_tokens_as_token_ids: bool = Field(default=False, description="name tokens as token_id:NUMBER in logprobs")
    keep_prompts: bool = Field(
        default=False, description="store prompts as long as the records of requests, so that requests can be replayed"
    )
    max_queued: int = Field(
        default=10_000,
        ge=1,
        description="maximum queued requests; beyond it, new ones get 429; of one tenant, eight times what is free",
    )
    max_queued_tokens: int = Field(
        default=100_000_000,
        ge=1,
        description="maximum queued tokens (prompts and longest outputs); beyond it, new requests get 429",
    )
    max_wait_s: float = Field(
        default=0.0,
        ge=0,
        description="maximum predicted time to first token; beyond it, requests get 429; 0: their deadline",
    )
    tenant_bytes: int = Field(
        default=256 << 20,
        ge=0,
        description="maximum bytes per tenant in the queue: requests, answers, jobs, conversations; 0: no limit;"
        " `lorafleet keys` sets it for one tenant; without keys: of everything that outlives its client",
    )
    max_open_calls: int = Field(
        default=16_384, ge=1, description="maximum concurrent calls per gateway; beyond it, new ones get 429"
    )
    gateway_memory: int = Field(
        default=2 << 30,
        ge=1 << 20,
        description="bytes of memory that calls may hold in one gateway; one tenant (without keys: one address) gets at"
        " most a quarter; beyond it, new calls get 429 or 503",
    )
    pair_template: Path | None = Field(
        default=None,
        description="file with the chat template that renders a reranker's pairs, as messages with the roles query and"
        " document; default: the model's own template, if it has these roles",
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1, description="maximum size of an HTTP request body")
    cors_origins: str = Field(
        default="",
        description="comma-separated origins allowed to call from a browser (CORS); *: any; empty: none",
    )
    path_prefix: str = Field(
        default="",
        description="additional path prefix of every route, for clients that need one: /tenant/llms/name",
    )
    max_connections: int = Field(default=20_000, ge=1, description="maximum open connections per gateway; others wait")
    max_connections_per_address: int = Field(
        default=1024,
        ge=0,
        description="maximum open connections per address (IPv6: /64), except this machine's; 0: no limit",
    )
    reads_per_s: float = Field(
        default=500,
        ge=0,
        description="maximum reads per second (no generation) of a tenant or address; lists cost more; 0: no limit",
    )
    head_timeout_s: float = Field(default=15.0, gt=0, description="maximum time for a request's head to arrive")
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="maximum time for a body to arrive, plus one second per 8 kB received"
    )
    send_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="maximum time a client may stop reading its answer, plus one second per 8 kB buffered",
    )
    max_choices: int = Field(default=128, ge=1, description="maximum choices per call: prompts × n")
    max_call_tokens: int = Field(
        default=4 << 20, ge=1, description="maximum prompt tokens per call, counted for each of its choices"
    )
    max_inputs: int = Field(
        default=2048, ge=1, description="maximum texts per call for embeddings or labels, and pairs per call for scores"
    )
    max_stop_strings: int = Field(default=64, ge=0, description="maximum stop strings per request")
    max_stop_characters: int = Field(default=1024, ge=1, description="maximum length of a stop string, in characters")
    max_logit_bias: int = Field(default=1024, ge=0, description="maximum tokens in one logit_bias")
    max_messages: int = Field(default=2048, ge=1, description="maximum messages per chat")
    max_grammar_bytes: int = Field(
        default=65_536, ge=1, description="maximum size of a JSON schema, regular expression or grammar in a request"
    )
    close_objects: bool = Field(
        default=True,
        description="in schemas of outputs and tools, treat objects with properties as closed unless the schema sets"
        " additionalProperties",
    )
    max_grammar_depth: int = Field(default=64, ge=1, le=200, description="maximum nesting of a request's JSON schema")
    grammar_timeout_s: float = Field(
        default=5.0, gt=0, description="maximum CPU time to compile a schema or grammar before it is refused"
    )
    template_timeout_s: float = Field(
        default=5.0, gt=0, description="maximum CPU time to render an adapter's own chat template"
    )
    sandboxes: int = Field(
        default=3,
        ge=2,
        le=16,
        description="maximum sandbox processes, for adapters' templates and grammars; one tenant gets all but one",
    )
    max_logprobs: int = Field(
        default=20, ge=0, description="maximum top_logprobs of a request; -1, all, is bounded in bytes; 0: none"
    )
    request_timeout_s: float = Field(default=3600.0, description="deadline of a request, from its submission")
    job_ttl_s: float = Field(default=86_400.0, description="retention of a job and its result")
    conversation_ttl_s: float = Field(
        default=30 * 86_400.0,
        gt=0,
        description="retention of a conversation after its last change; at least that of a job",
    )
    tenant_conversations: int = Field(
        default=10_000, ge=0, description="maximum conversations per tenant; 0: no limit; without keys: in all"
    )
    history_s: float = Field(default=86_400.0, ge=60, description="retention of ended and refused requests, in seconds")
    history_requests: int = Field(
        default=10_000, ge=100, le=1_000_000, description="maximum requests in a tenant's history; without keys: in all"
    )
    history: str = Field(
        default="",
        description="database of the history: sqlite:///FILE or postgresql://USER@HOST/NAME; default: the queue",
    )
    history_text: int = Field(
        default=0, ge=0, le=16_384, description="maximum tokens of each prompt and output kept in --history; 0: none"
    )
    history_text_bytes: int = Field(
        default=16 << 20, ge=1 << 20, description="maximum size of a tenant's kept prompts and outputs"
    )
    usage_days: int = Field(default=62, ge=0, le=400, description="days that usage data is kept; 0: none is counted")
    prometheus_url: str = Field(
        default="",
        pattern=r"^(https?://\S+)?$",
        description="http(s) URL of a Prometheus that scrapes the fleet, for charts of up to 90 days; empty: the"
        " gateway's own week",
    )
    prometheus_matchers: str = Field(
        default="",
        pattern=r'^([A-Za-z_]\w*(=|!=|=~|!~)"[^"\\]*",?)*$',
        description='label matchers of the fleet in that Prometheus, such as namespace="prod"; empty: all its series',
    )
    files: str = Field(
        default="",
        description="storage of uploaded files and batch results: a folder shared by all gateways, or"
        " s3://BUCKET/PREFIX; default: a folder in the data folder",
    )
    max_file_bytes: int = Field(default=200 << 20, ge=1, description="maximum size of an uploaded file")
    tenant_file_bytes: int = Field(
        default=10 << 30, ge=0, description="maximum total size of a tenant's files; 0: no limit; without keys: of all"
    )
    tenant_files: int = Field(
        default=10_000, ge=0, description="maximum files per tenant; 0: no limit; without keys: in all"
    )
    file_ttl_s: float = Field(default=30 * 86_400.0, gt=0, description="retention of a file; a client may ask for less")
    tenant_batches: int = Field(
        default=32, ge=1, description="maximum unfinished batches per tenant; without keys: in all"
    )
    max_batch_calls: int = Field(
        default=1024, ge=1, description="maximum batch lines that one gateway runs at once, if workers have free slots"
    )
    private_webhooks: bool = Field(
        default=False,
        description="allow webhooks to http:// URLs and to private networks; otherwise only to public https:// URLs",
    )
    webhook_dns: str = Field(
        default="", pattern=r"^(\d+(\.\d+){3}(:\d+)?)?$",
        description="DNS server for webhooks: IPv4 ADDRESS or ADDRESS:PORT; empty: that of /etc/resolv.conf",
    )  # fmt: skip
    keepalive_s: float = Field(default=10.0, description="idle time after which a stream gets a keep-alive comment")

    # Scheduler
    beat_timeout_s: float = Field(default=3.5, description="time without heartbeat after which a worker is dead")
    max_attempts: int = Field(default=3, description="worker failures after which a request becomes a dead letter")
    affinity_slack_tokens: int = Field(
        default=4096,
        description="affinity slack: weighted tokens that other tenants may receive while a request waits for a worker"
        " that has its adapter",
    )
    max_swap_wait_s: float = Field(
        default=30.0, gt=0, description="maximum wait for a base without a worker while another has more than its share"
    )
    min_residency_s: float = Field(
        default=5.0, ge=0, description="minimum time for which a worker serves a base before a swap, unless it is idle"
    )

    # Worker
    workers: int = Field(default=0, ge=0, description="number of workers that `up` starts; 0: one for each base")
    base: str = Field(
        default="", description="name of the base that a worker begins with, one of a fleet's; default: that of `model`"
    )
    swaps: bool = Field(default=True, description="let the scheduler switch a worker to another base of its fleet")
    worker_name: str = Field(
        default="", description="name of the worker, stable across restarts; default: host name and process id"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device of the workers; auto: a GPU if there is one"
    )
    gpus: str = Field(default="", description="GPUs to share out, one per worker; empty: the first visible one")
    gpu_locks: Path | None = Field(default=None, description="folder of the locks on GPUs; default: in the data folder")
    quantization: Literal["none", "int8", "int4"] = Field(
        default="none",
        description="CPU only: serve the base's linear layers in 8 or 4 bits, quantised once and cached",
    )
    quantize_activations: bool | None = Field(
        default=None,
        description="CPU only: also round the inputs of quantised layers to int8; default: where that is faster, on"
        " most processors without bfloat16 products",
    )
    kept_models: int = Field(
        default=4,
        ge=1,
        description="maximum cached folders made from GGUF, and quantised ones; the least recently used are deleted",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="dtype of weights and activations; auto: bfloat16, or float32 where torch computes on a CPU without"
        " bfloat16 arithmetic",
    )
    lora_dtype: Literal["auto", "int8"] = Field(
        default="auto", description="dtype of adapter weights; auto: as dtype; int8: CPU only, half the memory"
    )
    max_model_len: int = Field(
        default=0, description="maximum length of prompt plus output; 0: what the model and the KV cache allow"
    )
    score_tokens: str = Field(
        default="",
        description="two tokens, such as no,yes: a reranker's score is the logit of the second minus that of the first;"
        " empty: as in the model's folder",
    )
    max_num_seqs: int = Field(
        default=0, description="maximum sequences per worker at once; 0: 64 on a CPU, 256 on a GPU"
    )
    max_step_tokens: int = Field(default=0, description="maximum tokens per step; 0: 512 on a CPU, 2048 on a GPU")
    max_step_s: float = Field(
        default=60.0,
        gt=0,
        description="maximum duration of a step; a worker that exceeds it logs all stacks and exits, to be restarted",
    )
    max_slowdown: float = Field(
        default=1.5,
        ge=0,
        description="factor by which tenants over their fair share may lengthen a step; 0: no limit",
    )
    max_batch_slowdown: float = Field(
        default=1.1, ge=0, description="factor by which batch work may lengthen a step; 0: as max_slowdown"
    )
    max_mask_s: float = Field(
        default=30.0,
        gt=0,
        description="maximum CPU time for the token masks of a request's grammar; beyond it, the request fails",
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="fraction of a GPU's memory for weights, steps and caches"
    )
    kv_cache_bytes: int = Field(default=0, description="memory for KV blocks; 0: a share of the free memory")
    kv_cache_dtype: Literal["auto", "int8"] = Field(default="auto", description="dtype of the KV cache; int8: CPU only")
    adapter_pool_bytes: int = Field(
        default=0, description="memory for the LoRA weights of resident adapters; 0: a share of the free memory"
    )
    adapter_extra_bytes: int = Field(
        default=0,
        description="memory for experts' LoRA weights and adapters' other changes; 0: a share of the free memory",
    )
    adapter_host_bytes: int = Field(
        default=0, description="host memory for packed adapters; 0: a share of what is free"
    )
    merge_timeout_s: float = Field(default=60.0, gt=0, description="maximum duration of a merge of adapters")
    prefix_cache: bool = Field(default=True, description="reuse the KV blocks of shared prompt prefixes")
    threads: int = Field(
        default=0, description="CPU threads of a worker; 0: the machine's cores divided by its workers"
    )
    kernels: Literal[
        "auto", "reference", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon"
    ] = Field(
        default="auto",
        description="auto: native kernels where they exist; reference: plain torch; or the instruction set of a CPU",
    )
    draft_model: str = Field(
        default="",
        description="small model with the vocabulary of `model`, or EAGLE-3 head for it, that drafts its next tokens"
        " where that is faster: a Hub id, a local folder or a GGUF file; `model` itself: its own MTP head; empty: none",
    )
    max_draft_tokens: int = Field(
        default=0,
        ge=0,
        description="maximum draft tokens per sequence and step, by prompt lookup or the draft model; 0: none, or 8"
        " with a draft model",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto", description="record steps as CUDA graphs; auto: if the model allows it; on: fail if it does not"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        default="auto", description="launch a step before the previous step's tokens are known; auto: on a GPU"
    )
    deterministic: bool = Field(
        default=False, description="make outputs bit-identical whatever else is in the batch; slower"
    )
    compile: bool = Field(default=False, description="compile each decoder layer with torch.compile")

    # Store
    adapters: Path | None = Field(
        default=None, description="folder whose subfolders are adapters, served under their names"
    )
    adapter_roots: str = Field(default="", description="more folders of adapters, comma-separated, to load by path")
    store_host: str = Field(default="127.0.0.1", description="address that the store listens on for workers")
    store_port: int = Field(default=0, ge=0, le=65535, description="port that the store listens on; 0: any free one")
    store_url: str = Field(default="", description="URL of the store for workers; default: from its host and port")
    scan_interval_s: float = Field(default=1.0, description="pause between scans of the adapter folder")
    max_adapter_bytes: int = Field(default=8 << 30, ge=1, description="maximum size of an adapter's file")
    upload_bytes: int = Field(
        default=20 << 30, ge=0, description="maximum size of all uploads in the adapter folder; 0: uploads are off"
    )
    effect_test: Literal["off", "folders", "all"] = Field(
        default="folders",
        description="which adapters are checked for having no effect (everything they add is zero)",
    )
    convert_adapters: bool = Field(
        default=False,
        description="approximate adapters of C3A, FourierFT, RandLoRA, WaveFT, PSOFT and TinyLoRA by LoRA instead of"
        " refusing them; the store then needs torch, PEFT and the base's weights",
    )
    convert_timeout_s: float = Field(default=600.0, gt=0, description="maximum duration of such a conversion")
    store_quota_bytes: int = Field(
        default=0,
        ge=0,
        description="disk space for mirrored adapters; the least recently used are evicted; 0: no limit",
    )
    request_sources: str = Field(
        default="", description="sources whose adapters requests may name without registration: hub, s3 or hub,s3"
    )
    hub_orgs: str = Field(
        default="", description="comma-separated Hub organisations that adapters may come from; empty: any"
    )
    s3_buckets: str = Field(
        default="", description="comma-separated S3 buckets that adapters may come from; empty: none"
    )
    tenant_places: str = Field(
        default="",
        description="comma-separated Hub organisations and s3://BUCKET[/PREFIX] that tenants with API keys may"
        " read with the fleet's credentials; empty: none",
    )
    max_tenant_adapters: int = Field(
        default=1000, ge=1, description="maximum registered adapters per tenant with API keys"
    )
    max_registrations_per_minute: int = Field(
        default=60, ge=1, description="maximum registrations per minute and tenant with API keys"
    )
    access_check_s: float = Field(
        default=60.0,
        gt=0,
        description="time for which the Hub's permission to read an adapter with a caller's token is cached",
    )
    hub_endpoint: str = Field(default="", description="URL of the Hub; default: HF_ENDPOINT or huggingface.co")
    s3_endpoint: str = Field(
        default="", description="URL of an S3-compatible server; default: AWS, or the AWS_ENDPOINT_URL variables"
    )
    preload: str = Field(
        default="",
        description="comma-separated adapters that every worker fetches at its start: names, Hub ids, s3:// URLs",
    )
    pin: str = Field(
        default="",
        description="comma-separated adapters that always stay in every worker's memory, named as for --preload",
    )
    refresh_s: float = Field(default=300.0, gt=0, description="interval between checks of remote sources for changes")
    max_downloads: int = Field(default=8, ge=1, description="maximum concurrent downloads per store and source")
    store_bucket: str = Field(default="", description="s3://BUCKET/PREFIX where several stores share fetched adapters")

    @field_validator("adapters", "gpu_locks")
    @classmethod
    def _expand_more(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else path

    @property
    def draft_tokens(self) -> int:
        """Maximum draft tokens per sequence and step; 0: none."""
        return self.max_draft_tokens or (DRAFT_TOKENS if self.draft_model else 0)

    @property
    def metrics_named(self) -> int:
        """Maximum number of names on /metrics; 0 if it is readable without a key although there are API keys."""
        return 0 if self.api_keys and self.open_pages else self.metrics_names


def names_of(text: str) -> tuple[str, ...]:
    """Return the distinct names in a comma-separated setting, in order."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
