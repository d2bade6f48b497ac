"""Every setting of the fleet, once. Read from flags, `LORAFLEET_*` variables and a TOML file, in that order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

CONFIG_VARIABLE = "LORAFLEET_CONFIG"

SHORT_STEP_TOKENS_PER_SEQ = 2
"""Size of a step, in tokens per sequence that a worker runs at most, while prompts of low priority are computed.

A prompt that arrives during a step waits for its end, so such steps are short. Each decode takes one token, which
leaves as many for prompts: enough in the long run where prompts are no longer than answers.
"""


class Settings(BaseSettings):
    """Settings of all services; each reads those it needs. The names end with the unit."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_", frozen=True, extra="forbid", validate_default=True)

    # Everyone
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", description="the queue, redis:// or unix://")
    model: str = Field(default="", description="base model: a Hub id or a local folder")
    served_name: str = Field(default="", description="the base model's name in the API; default: its id or folder name")
    data: Path = Field(
        default=Path("~/.cache/lorafleet"), description="folder for the queue's data, mirrored adapters and caches"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    log_format: Literal["text", "json"] = Field(default="text", description="how the logs' lines are written")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Prometheus port of scheduler, store and worker; 0: none"
    )
    grace_s: float = Field(default=30.0, ge=0, description="how long a drain may take")
    secret: str = Field(default="", repr=False, description="shared by all services; better in a variable or a file")
    secret_file: Path | None = Field(
        default=None, description="file with the secret, made if it is not there; `up`: in the data folder"
    )

    # Gateway
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any free one (`up` only)")
    api_keys: bool = Field(
        default=False,
        description="require an API key, see `lorafleet keys`; off: everybody who can connect has every right",
    )
    max_queued: int = Field(default=10_000, ge=1, description="requests waiting in the queue before new ones get 429")
    max_queued_tokens: int = Field(
        default=100_000_000, ge=1, description="tokens, prompt and longest output, waiting before new requests get 429"
    )
    max_wait_s: float = Field(
        default=0.0,
        ge=0,
        description="predicted wait for a first token from which on requests get 429; 0: the deadline",
    )
    max_open_calls: int = Field(
        default=16_384, ge=1, description="calls that one gateway answers at once before new ones get 429"
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1, description="largest HTTP body")
    cors_origins: str = Field(
        default="", description="origins whose pages may call from a browser, with commas; * for any; empty: none"
    )
    path_prefix: str = Field(
        default="",
        description="path that may stand before every route, for clients whose URL has one: /tenant/llms/name",
    )
    max_choices: int = Field(default=128, ge=1, description="largest n, and prompts times n in one call")
    max_inputs: int = Field(default=2048, ge=1, description="texts in one call for embeddings or labels of tokens")
    max_stop_strings: int = Field(default=64, ge=0, description="stop strings in one request")
    max_stop_characters: int = Field(default=1024, ge=1, description="characters of one stop string")
    max_logit_bias: int = Field(default=1024, ge=0, description="tokens in one logit_bias")
    max_messages: int = Field(default=2048, ge=1, description="messages in one chat")
    max_grammar_bytes: int = Field(
        default=65_536, ge=1, description="largest JSON schema, regular expression or grammar of a request"
    )
    max_grammar_depth: int = Field(default=64, ge=1, description="deepest nesting of a request's JSON schema")
    grammar_timeout_s: float = Field(
        default=5.0, gt=0, description="how long the gateway lets a schema or grammar be compiled before refusing it"
    )
    max_logprobs: int = Field(default=20, ge=0, description="largest top_logprobs")
    request_timeout_s: float = Field(default=3600.0, description="deadline of a request")
    job_ttl_s: float = Field(default=86_400.0, description="how long a job and its result are kept")
    keepalive_s: float = Field(default=10.0, description="pause after which a silent stream gets a comment")

    # Scheduler
    beat_timeout_s: float = Field(default=3.5, description="silence after which a worker counts as dead")
    max_attempts: int = Field(default=3, description="workers that may die under a request before it is given up")
    affinity_slack_tokens: int = Field(default=4096, description="how far fairness may be bent for adapter affinity")

    # Worker
    workers: int = Field(default=1, ge=1, description="workers that `lorafleet up` starts")
    worker_name: str = Field(default="", description="stable name across restarts; default: host name and process id")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where a worker computes; auto: a GPU if any"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="of weights and activations; auto: bfloat16 where the hardware multiplies it, else float32",
    )
    max_model_len: int = Field(
        default=0, description="longest prompt + output in tokens; 0: what model and cache allow"
    )
    max_num_seqs: int = Field(default=0, description="requests running at once; 0: 64 on CPU, 256 on a GPU")
    max_step_tokens: int = Field(default=0, description="tokens in one forward pass; 0: 512 on CPU, 2048 on a GPU")
    kv_cache_bytes: int = Field(default=0, description="memory for KV blocks; 0: a share of what is free")
    adapter_pool_bytes: int = Field(default=0, description="memory for resident adapters; 0: a share of what is free")
    adapter_extra_bytes: int = Field(
        default=0,
        description="memory for what adapters bring besides low-rank rows, as whole heads; 0: a share of what is free",
    )
    adapter_host_bytes: int = Field(
        default=0, description="host memory for packed adapters; 0: a share of what is free"
    )
    prefix_cache: bool = Field(default=True, description="reuse the KV blocks of equal prompt beginnings")
    threads: int = Field(
        default=0, description="CPU threads of a worker; 0: all cores over the workers of this machine"
    )
    kernels: Literal["auto", "reference"] = Field(
        default="auto", description="reference: plain torch instead of native code"
    )
    max_draft_tokens: int = Field(
        default=0,
        ge=0,
        description="tokens a request may guess from its own text and check in one step; 0: none are guessed",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="replay recorded decode steps on a GPU; auto: unless the model cannot be recorded; on: or fail",
    )
    compile: bool = Field(default=False, description="torch.compile each decoder layer")

    # Store
    adapters: Path | None = Field(default=None, description="folder whose sub-folders are adapters")
    store_host: str = Field(default="127.0.0.1", description="address the store listens on, for workers")
    store_port: int = Field(default=0, ge=0, le=65535, description="port the store listens on; 0: any free port")
    store_url: str = Field(default="", description="the store's address as workers see it; default: from host and port")
    scan_interval_s: float = Field(default=1.0, description="how often the adapter folder is looked at")
    max_adapter_bytes: int = Field(default=8 << 30, ge=1, description="largest adapter")
    store_quota_bytes: int = Field(
        default=0, ge=0, description="disk for mirrored adapters, least used ones leave first; 0: no limit"
    )
    request_sources: str = Field(
        default="", description="remote sources a request may name unregistered: hub, s3, or hub,s3"
    )
    hub_orgs: str = Field(default="", description="Hub organisations adapters may come from, with commas; empty: any")
    s3_buckets: str = Field(default="", description="S3 buckets adapters may come from, with commas; empty: none")
    hub_endpoint: str = Field(default="", description="URL of the Hub; default: HF_ENDPOINT or huggingface.co")
    s3_endpoint: str = Field(default="", description="URL of an S3-compatible server; default: AWS, or its variables")
    preload: str = Field(
        default="", description="adapters every worker fetches at its start, with commas: names, Hub ids, s3:// places"
    )
    pin: str = Field(default="", description="adapters that never leave a worker's pool, with commas: as preload")
    refresh_s: float = Field(default=300.0, gt=0, description="how often a remote name is looked up again")
    max_downloads: int = Field(default=8, ge=1, description="adapters a store fetches at once")
    store_bucket: str = Field(default="", description="s3://BUCKET/PREFIX that several stores share as second tier")

    @field_validator("data", "adapters", "secret_file")
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
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get(CONFIG_VARIABLE))
        return init_settings, env_settings, toml

    def environment(self) -> dict[str, str]:
        """Return the `LORAFLEET_*` variables that make another process read exactly these settings."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return {f"LORAFLEET_{name.upper()}": str(value) for name, value in values.items()}


def names_of(text: str) -> tuple[str, ...]:
    """Return the names in a setting that lists them with commas."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
