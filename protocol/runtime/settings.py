"""Every setting of the fleet, declared once.

A flag wins over a `LORAFLEET_*` variable, and a variable over the TOML file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from protocol.runtime.queue_url import full_url

CONFIG_VARIABLE = "LORAFLEET_CONFIG"
"""Names the TOML file."""

BLOCK_TOKENS = 16
"""Tokens of a KV block."""

SHORT_STEP_TOKENS_PER_SEQ = 2
"""Tokens of a short step, per request that a worker may run at once.

Prompts that yield are computed in short steps while there are requests that do not: a prompt that arrives during a step
waits for its end. At two tokens per sequence, decodes take one each and leave as many for prompts.
"""

SHORT_STEPS_AFTER = 64
"""Steps that stay short after the last request that does not yield: whoever asks now and then asks again soon."""


class Settings(BaseSettings):
    """The settings of all services; each reads those it needs. Units are in the names.

    The order matters: `--help` groups the fields by `SECTIONS` of `lorafleet/flags.py`.
    """

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_", frozen=True, extra="forbid", validate_default=True)

    # Everyone
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        repr=False,
        description="the queue: a Redis or Valkey server, as redis://, rediss:// (TLS) or unix:// URL, or several of"
        " them behind Sentinels, as redis-sentinel://USER@HOST:PORT,HOST:PORT/NAME/DB",
    )
    redis_password_file: Path | None = Field(
        default=None, description="file that holds the password of the user that the queue's URL names"
    )
    redis_sentinel_password_file: Path | None = Field(
        default=None, description="file that holds the password of the Sentinels, if they have one"
    )
    redis_ca_file: Path | None = Field(
        default=None, description="certificates that the queue's must be signed by; default: this machine's"
    )
    redis_cert_file: Path | None = Field(default=None, description="client certificate to show to the queue")
    redis_key_file: Path | None = Field(default=None, description="private key of the client certificate")
    queue_bytes: int = Field(
        default=0, ge=0, description="most memory of the queue that `up` starts; 0: a quarter of this machine's"
    )
    model: str = Field(default="", description="the base model: a Hub id, a local folder or a GGUF file")
    task: Literal["auto", "score"] = Field(
        default="auto",
        description="what the base model is for; score makes a classifier of texts of an encoder whose folder has no"
        " head, so that each adapter must bring one",
    )
    served_name: str = Field(default="", description="name of the base model in the API; default: its Hub id or folder")
    data: Path = Field(
        default=Path("~/.cache/lorafleet"), description="folder for the queue's data, adapters, caches and logs"
    )
    keep_free: int = Field(default=1 << 30, ge=0, description="bytes of each disk that files and adapters leave free")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="lowest level logged")
    log_format: Literal["text", "json"] = Field(default="text", description="format of log lines")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port of the metrics of scheduler, store and worker; 0: none"
    )
    metrics_names: int = Field(
        default=100, ge=0, le=1000, description="adapters, and tenants, with series of their own; the rest are `other`"
    )
    vllm_metrics: bool = Field(
        default=False, description="show where adapters are, and vLLM's series, on the gateways' /metrics too"
    )
    otlp_endpoint: str = Field(default="", description="collector that spans are sent to, as http://HOST:4318")
    trace_share: float = Field(
        default=0.1, ge=0, le=1, description="part of the calls without a traceparent of their own that are traced"
    )
    grace_s: float = Field(
        default=30.0, ge=0, description="how long a stopping service may take to finish or hand over its requests"
    )
    secret: str = Field(
        default="",
        repr=False,
        description="secret that all services share: a variable, or better --secret-file; there is no flag",
    )
    secret_file: Path | None = Field(
        default=None,
        description="file that holds the secret, created if missing; default for `up`: a file in the data folder",
    )
    wait_for_worker_s: float = Field(
        default=0.0,
        ge=0,
        description="how long a call waits in the queue while there is no worker, which then may be started for it;"
        " 0: such calls get 503 at once; the same for all gateways and schedulers",
    )
    seal_bodies: bool = Field(
        default=False,
        description="encrypt prompts while they lie in the queue, by the secret; the same for all gateways and workers",
    )

    # Gateway
    host: str = Field(default="127.0.0.1", description="address the gateway listens on")
    port: int = Field(default=8000, ge=0, le=65535, description="the gateway's port; 0: any free one (`up` only)")
    api_keys: bool = Field(
        default=False,
        description="require API keys (see `lorafleet keys`); otherwise anyone who reaches the gateway has full access",
    )
    console_keys: bool = Field(
        default=False, description="let operators make, limit and revoke API keys over HTTP and in the console"
    )
    open_pages: bool = Field(
        default=False,
        description="with API keys: serve /metrics and /openapi.json without a key (else /metrics needs scope admin)",
    )
    allowed_hosts: str = Field(
        default="",
        description="without API keys: names by which clients reach the gateway, separated by commas, besides this "
        "machine's; *: any",
    )
    unknown_parameters: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="what a request's unknown or unsupported parameter becomes: a 400, or a header and a log line",
    )
    hosted_tools: Literal["leave_out", "refuse"] = Field(
        default="leave_out", description="what a tool that runs at OpenAI or Anthropic becomes: none, or a 400"
    )
    force_include_usage: bool = Field(default=False, description="streams of OpenAI's routes always tell the usage")
    per_request_metrics: bool = Field(default=False, description="chats and completions tell their times: metrics")
    return_tokens_as_token_ids: bool = Field(default=False, description="logprobs name tokens token_id:NUMBER")
    keep_prompts: bool = Field(
        default=False, description="keep prompts as long as the records of requests, so that these can be replayed"
    )
    max_queued: int = Field(
        default=10_000, ge=1, description="most requests that may wait in the queue; beyond that, new ones get 429"
    )
    max_queued_tokens: int = Field(
        default=100_000_000,
        ge=1,
        description="most tokens (prompts and longest outputs) that may wait; beyond that, new requests get 429",
    )
    max_wait_s: float = Field(
        default=0.0,
        ge=0,
        description="longest predicted wait for a first token; beyond that, requests get 429; 0: their deadline",
    )
    tenant_bytes: int = Field(
        default=256 << 20,
        ge=0,
        description="most bytes that a tenant may keep in the queue: requests, answers, jobs, conversations; 0: no"
        " limit; `lorafleet keys` sets it for one; without keys: of all that outlives its client",
    )
    max_open_calls: int = Field(
        default=16_384, ge=1, description="most calls that one gateway answers at once; beyond that, new ones get 429"
    )
    gateway_memory: int = Field(
        default=2 << 30,
        ge=1 << 20,
        description="bytes of memory that calls may hold in one gateway, a quarter of them one tenant's or, without "
        "keys, one address's; beyond that, new ones get 429 or 503",
    )
    pair_template: Path | None = Field(
        default=None,
        description="file with the chat template that makes prompts of a reranker's pairs, whose messages have the"
        " roles query and document; without it the model's own template, if it names these",
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1, description="largest HTTP request body")
    cors_origins: str = Field(
        default="",
        description="origins allowed to call from a browser (CORS), separated by commas; *: any; empty: none",
    )
    path_prefix: str = Field(
        default="",
        description="path prefix that every route also answers under, for clients that need one: /tenant/llms/name",
    )
    max_connections: int = Field(default=20_000, ge=1, description="most open connections of one gateway; others wait")
    max_connections_per_address: int = Field(
        default=1024,
        ge=0,
        description="most open connections from one address (IPv6: a /64), this machine's own not counted; 0: no limit",
    )
    reads_per_s: float = Field(
        default=500,
        ge=0,
        description="requests a second that are no calls, of a tenant or an address; lists cost more; 0: no limit",
    )
    head_timeout_s: float = Field(default=15.0, gt=0, description="longest time for a request's head to arrive")
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="longest time for a body, plus a second for each 8 kB of it that have arrived"
    )
    send_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="longest time for which a client may not read its answer, plus a second for each 8 kB that wait",
    )
    max_choices: int = Field(default=128, ge=1, description="most choices in one call: its prompts times n")
    max_call_tokens: int = Field(
        default=4 << 20, ge=1, description="most prompt tokens in one call, counted for each of its choices"
    )
    max_inputs: int = Field(
        default=2048, ge=1, description="most texts in one call for embeddings or labels, and most pairs for scores"
    )
    max_stop_strings: int = Field(default=64, ge=0, description="most stop strings in one request")
    max_stop_characters: int = Field(default=1024, ge=1, description="longest stop string, in characters")
    max_logit_bias: int = Field(default=1024, ge=0, description="most tokens in one logit_bias")
    max_messages: int = Field(default=2048, ge=1, description="most messages in one chat")
    max_grammar_bytes: int = Field(
        default=65_536, ge=1, description="largest JSON schema, regular expression or grammar in a request"
    )
    close_objects: bool = Field(
        default=True,
        description="in schemas of outputs and tools, objects that name properties have no others, unless the schema"
        " itself says so with additionalProperties",
    )
    max_grammar_depth: int = Field(default=64, ge=1, le=200, description="deepest nesting of a request's JSON schema")
    grammar_timeout_s: float = Field(
        default=5.0, gt=0, description="most CPU time to compile a schema or grammar before it is refused"
    )
    template_timeout_s: float = Field(
        default=5.0, gt=0, description="most CPU time to render a chat template that an adapter brings"
    )
    sandboxes: int = Field(
        default=3,
        ge=2,
        le=16,
        description="most processes at once that run adapters' templates and compile grammars; a tenant gets one less",
    )
    max_logprobs: int = Field(default=20, ge=0, description="largest top_logprobs in a request")
    request_timeout_s: float = Field(default=3600.0, description="deadline of a request, counted from its submission")
    job_ttl_s: float = Field(default=86_400.0, description="how long a job and its result are kept")
    conversation_ttl_s: float = Field(
        default=30 * 86_400.0, gt=0, description="how long a conversation is kept after it changed; at least as a job"
    )
    tenant_conversations: int = Field(
        default=10_000, ge=0, description="most conversations of a tenant; 0: no limit; without keys: of all"
    )
    usage_days: int = Field(default=62, ge=0, le=400, description="days that usage is kept; 0: it is not counted")
    files: str = Field(
        default="",
        description="where uploaded files and the answers of batches are: a folder that all gateways share, or"
        " s3://BUCKET/PREFIX; default: a folder in the data folder",
    )
    max_file_bytes: int = Field(default=200 << 20, ge=1, description="largest uploaded file")
    tenant_file_bytes: int = Field(
        default=10 << 30, ge=0, description="most bytes of a tenant's files; 0: no limit; without keys: of all files"
    )
    tenant_files: int = Field(
        default=10_000, ge=0, description="most files of a tenant; 0: no limit; without keys: of all files"
    )
    file_ttl_s: float = Field(
        default=30 * 86_400.0, gt=0, description="how long a file is kept; a client may ask for less"
    )
    tenant_batches: int = Field(
        default=32, ge=1, description="most batches of a tenant that have not ended; without keys: of all batches"
    )
    max_batch_calls: int = Field(
        default=1024, ge=1, description="most lines of batches that one gateway runs at once, if workers have places"
    )
    private_webhooks: bool = Field(
        default=False,
        description="let webhooks go to http:// and to addresses of private networks; else only to https:// outside",
    )
    webhook_dns: str = Field(
        default="", pattern=r"^(\d+(\.\d+){3}(:\d+)?)?$",
        description="IPv4 address, or ADDRESS:PORT, of the DNS server for webhooks; empty: as /etc/resolv.conf says",
    )  # fmt: skip
    keepalive_s: float = Field(default=10.0, description="silence after which a stream gets a keep-alive comment")

    # Scheduler
    beat_timeout_s: float = Field(default=3.5, description="silence after which a worker counts as dead")
    max_attempts: int = Field(default=3, description="worker deaths after which a request is moved to the dead letters")
    affinity_slack_tokens: int = Field(
        default=4096,
        description="tokens by which a tenant may get ahead of its fair share so that warm adapters are used",
    )

    # Worker
    workers: int = Field(default=1, ge=1, description="number of workers that `up` starts")
    worker_name: str = Field(
        default="", description="name of the worker, the same across restarts; default: host name and process id"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device of the workers; auto: a GPU if there is one"
    )
    gpus: str = Field(
        default="", description="GPUs of which each worker takes one that no other has; empty: the first that it sees"
    )
    gpu_locks: Path | None = Field(default=None, description="folder of their locks; default: in the data folder")
    quantization: Literal["none", "int8", "int4"] = Field(
        default="none",
        description="on a CPU: quantise the base's linear layers to 8 or 4 bits once, in the cache, and serve these",
    )
    quantize_activations: bool = Field(
        default=False, description="on a CPU: round inputs of quantised layers to int8 too: faster, less exact"
    )
    kept_models: int = Field(
        default=4,
        ge=1,
        description="most folders in the cache that are made of GGUF files, and most quantised ones; those used least"
        " recently are deleted",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="type of weights and activations; auto: bfloat16, but float32 where torch computes on a processor"
        " that does not multiply it",
    )
    lora_dtype: Literal["auto", "int8"] = Field(
        default="auto", description="type of adapters' rows; auto: dtype; int8: on a CPU, rounded, and half the bytes"
    )
    max_model_len: int = Field(
        default=0, description="longest prompt plus output; 0: what the model and the KV cache allow"
    )
    score_tokens: str = Field(
        default="",
        description="two tokens, as no,yes, by which a reranker's base scores a text: the logit of the second less that"
        " of the first; empty: what the model's folder says",
    )
    max_num_seqs: int = Field(
        default=0, description="most sequences that a worker runs at once; 0: 64 on a CPU, 256 on a GPU"
    )
    max_step_tokens: int = Field(default=0, description="most tokens in one step; 0: 512 on a CPU, 2048 on a GPU")
    max_step_s: float = Field(
        default=60.0,
        gt=0,
        description="longest step; a worker that is in one for longer logs all its stacks and ends, to be restarted",
    )
    max_slowdown: float = Field(
        default=1.5,
        ge=0,
        description="how many times as long a step may take for tenants with more than their share; 0: any time",
    )
    max_batch_slowdown: float = Field(
        default=1.1, ge=0, description="how many times as long a step may take for batch work; 0: as max_slowdown"
    )
    max_mask_s: float = Field(
        default=30.0,
        gt=0,
        description="most CPU time to find out which tokens the grammar of one request allows; beyond that it fails",
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="part of a GPU's memory that weights, steps and caches may fill"
    )
    kv_cache_bytes: int = Field(default=0, description="memory for KV blocks; 0: a share of the free memory")
    kv_cache_dtype: Literal["auto", "int8"] = Field(default="auto", description="type of keys, values; int8: CPU only")
    adapter_pool_bytes: int = Field(
        default=0, description="memory for the LoRA rows of resident adapters; 0: a share of the free memory"
    )
    adapter_extra_bytes: int = Field(
        default=0,
        description="memory for LoRA rows of experts, and what adapters change beyond rows; 0: a share of what is free",
    )
    adapter_host_bytes: int = Field(default=0, description="host memory for packed adapters; 0: part of what is free")
    merge_timeout_s: float = Field(default=60.0, gt=0, description="longest time that a merge of adapters may take")
    prefix_cache: bool = Field(default=True, description="reuse the KV blocks of prompts that begin alike")
    threads: int = Field(
        default=0, description="CPU threads of a worker; 0: the machine's cores divided by its workers"
    )
    kernels: Literal["auto", "reference", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon"] = Field(
        default="auto",
        description="auto: native kernels where they exist; reference: plain torch; or the instruction set of a CPU",
    )
    max_draft_tokens: int = Field(
        default=0, ge=0, description="most draft tokens per sequence and step, proposed from its own text; 0: none"
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto", description="record steps as CUDA graphs; auto: if the model allows it; on: or fail"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        default="auto", description="launch a step before the tokens of the one before are known; auto: on a GPU"
    )
    deterministic: bool = Field(
        default=False, description="add in one order whatever is beside a text, so that it has the same bits; slower"
    )
    compile: bool = Field(default=False, description="compile each decoder layer with torch.compile")

    # Store
    adapters: Path | None = Field(
        default=None, description="folder whose sub-folders are adapters, served under their names"
    )
    adapter_roots: str = Field(default="", description="more folders of adapters, by commas, to be loaded by path")
    store_host: str = Field(default="127.0.0.1", description="address the store listens on for workers")
    store_port: int = Field(default=0, ge=0, le=65535, description="port the store listens on; 0: any free one")
    store_url: str = Field(default="", description="URL of the store for workers; default: from its host and port")
    scan_interval_s: float = Field(default=1.0, description="pause between scans of the adapter folder")
    max_adapter_bytes: int = Field(default=8 << 30, ge=1, description="largest file of an adapter")
    upload_bytes: int = Field(
        default=20 << 30, ge=0, description="most bytes of uploaded adapters in the adapter folder; 0: none are taken"
    )
    effect_test: Literal["off", "folders", "all"] = Field(
        default="folders",
        description="which adapters are looked through for having no effect: all that they add is zero",
    )
    store_quota_bytes: int = Field(
        default=0, ge=0, description="space for mirrored adapters; the least recently used leave first; 0: no limit"
    )
    request_sources: str = Field(
        default="", description="sources whose adapters a request may name without registration: hub, s3 or hub,s3"
    )
    hub_orgs: str = Field(
        default="", description="Hub organisations that adapters may come from, separated by commas; empty: any"
    )
    s3_buckets: str = Field(
        default="", description="S3 buckets that adapters may come from, separated by commas; empty: none"
    )
    tenant_places: str = Field(
        default="",
        description="Hub organisations and s3://BUCKET[/PREFIX] that tenants with API keys read with the fleet's own"
        " credentials, separated by commas; empty: none",
    )
    max_tenant_adapters: int = Field(
        default=1000, ge=1, description="most adapters that one tenant with API keys may have registered"
    )
    max_registrations_per_minute: int = Field(
        default=60, ge=1, description="most adapters that one tenant with API keys may register in a minute"
    )
    access_check_s: float = Field(
        default=60.0,
        gt=0,
        description="how long it holds that the Hub lets a caller's token read an adapter; then the Hub is asked again",
    )
    hub_endpoint: str = Field(default="", description="URL of the Hub; default: HF_ENDPOINT or huggingface.co")
    s3_endpoint: str = Field(
        default="", description="URL of an S3-compatible server; default: AWS or what its variables say"
    )
    preload: str = Field(
        default="",
        description="adapters that every worker fetches at its start, separated by commas: names, Hub ids, s3:// URLs",
    )
    pin: str = Field(
        default="",
        description="adapters that never leave a worker's memory, separated by commas, named as for --preload",
    )
    refresh_s: float = Field(default=300.0, gt=0, description="how often names from remote sources are looked up again")
    max_downloads: int = Field(default=8, ge=1, description="most adapters a store fetches at once from one source")
    store_bucket: str = Field(
        default="", description="s3://BUCKET/PREFIX where several stores share what they have fetched"
    )

    @field_validator(
        "data", "adapters", "gpu_locks", "secret_file", "redis_password_file", "redis_sentinel_password_file",
        "redis_ca_file", "redis_cert_file", "redis_key_file",
    )  # fmt: skip
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else path

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read values given to the constructor first, then variables, then the TOML file."""
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get(CONFIG_VARIABLE))
        return init_settings, env_settings, toml

    def queue_url(self) -> str:
        """Return the queue's URL with password and certificates: for the client that connects, not for people.

        Raises BadRequest when the files do not fit the URL or cannot be read.
        """
        return full_url(
            self.redis_url, password_file=self.redis_password_file,
            sentinel_password_file=self.redis_sentinel_password_file, ca_file=self.redis_ca_file,
            cert_file=self.redis_cert_file, key_file=self.redis_key_file,
        )  # fmt: skip

    @property
    def metrics_named(self) -> int:
        """How many names /metrics may have: none where strangers read it."""
        return 0 if self.api_keys and self.open_pages else self.metrics_names

    def environment(self) -> dict[str, str]:
        """Return the `LORAFLEET_*` variables with which another process reads exactly these settings."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return {f"LORAFLEET_{name.upper()}": str(value) for name, value in values.items()}


def names_of(text: str) -> tuple[str, ...]:
    """Return the names in a setting that separates them by commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
