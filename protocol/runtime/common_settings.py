"""The sources of settings, and the settings that every service reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from protocol.runtime.queue_url import full_url

CONFIG_VARIABLE = "LORAFLEET_CONFIG"
"""Environment variable with the path of the TOML file."""


class CommonSettings(BaseSettings):
    """Settings of every service: the queue, the base models, folders, logs and metrics."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_", frozen=True, extra="forbid", validate_default=True)

    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        repr=False,
        description="URL of the queue, a Redis or Valkey server: redis://, rediss:// (TLS), unix://, or with Sentinels"
        " redis-sentinel://USER@HOST:PORT,HOST:PORT/NAME/DB",
    )
    redis_password_file: Path | None = Field(
        default=None, description="file with the password of the user named in the queue's URL"
    )
    redis_sentinel_password_file: Path | None = Field(
        default=None, description="file with the password of the Sentinels, if they have one"
    )
    redis_ca_file: Path | None = Field(
        default=None, description="CA certificates that must have signed the queue's certificate; default: the system's"
    )
    redis_cert_file: Path | None = Field(default=None, description="client certificate for the queue")
    redis_key_file: Path | None = Field(default=None, description="private key of the client certificate")
    queue_bytes: int = Field(
        default=0, ge=0, description="memory limit of the queue that `up` starts; 0: a quarter of this machine's"
    )
    model: str = Field(default="", description="the base model: a Hub id, a local folder or a GGUF file")
    more_models: str = Field(
        default="",
        description="further base models of this fleet, comma-separated; set it alike for all gateways and stores, and"
        " there `model` too, whose base is the default one; a worker without it joins no workers of other bases",
    )
    task: Literal["auto", "score"] = Field(
        default="auto",
        description="task of the base model; score serves an encoder without a head as a text classifier, and every"
        " adapter must bring its own head",
    )
    served_name: str = Field(default="", description="name of the base model in the API; default: its Hub id or folder")
    data: Path = Field(
        default=Path("~/.cache/lorafleet"), description="folder for the queue's data, adapters, caches and logs"
    )
    keep_free: int = Field(
        default=1 << 30, ge=0, description="bytes of free space that files and adapters leave on each disk"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="minimum log level")
    log_format: Literal["text", "json"] = Field(default="text", description="format of log lines")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port where scheduler, store and worker serve metrics; 0: none"
    )
    metrics_names: int = Field(
        default=100, ge=0, le=1000, description="adapters, and tenants, with their own time series; the rest: `other`"
    )
    vllm_metrics: bool = Field(
        default=False, description="also export vLLM's series and adapters' locations on gateways' /metrics"
    )
    otlp_endpoint: str = Field(default="", description="OpenTelemetry collector that receives spans: http://HOST:4318")
    trace_share: float = Field(
        default=0.1, ge=0, le=1, description="fraction of calls without a traceparent that are traced"
    )
    grace_s: float = Field(
        default=30.0, ge=0, description="maximum time for a stopping service to finish or hand over its requests"
    )
    secret: str = Field(
        default="",
        repr=False,
        description="secret shared by all services: a variable, or better --secret-file; there is no flag",
    )
    secret_file: Path | None = Field(
        default=None,
        description="file with the shared secret, created if missing; default for `up`: a file in the data folder",
    )
    wait_for_worker_s: float = Field(
        default=0.0,
        ge=0,
        description="maximum time a call waits in the queue while no worker is up, so that one can be started for it"
        " (scale from zero); 0: such calls get 503 at once; set it alike for all gateways and schedulers",
    )
    seal_bodies: bool = Field(
        default=False,
        description="encrypt prompts in the queue with the secret; set it alike for all gateways and workers",
    )

    @field_validator(
        "data", "secret_file", "redis_password_file", "redis_sentinel_password_file", "redis_ca_file",
        "redis_cert_file", "redis_key_file",
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
        """Return the sources by precedence: constructor arguments, environment variables, the TOML file."""
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get(CONFIG_VARIABLE))
        return init_settings, env_settings, toml

    def queue_url(self) -> str:
        """Return the queue's URL with password and certificates: for the connecting client, not for display.

        Raises BadRequest if the files do not fit the URL or cannot be read.
        """
        return full_url(
            self.redis_url, password_file=self.redis_password_file,
            sentinel_password_file=self.redis_sentinel_password_file, ca_file=self.redis_ca_file,
            cert_file=self.redis_cert_file, key_file=self.redis_key_file,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return the `LORAFLEET_*` variables from which another process reads exactly these settings."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return {f"LORAFLEET_{name.upper()}": str(value) for name, value in values.items()}
