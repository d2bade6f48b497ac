"""The environment variables that child processes inherit: what they need to run, and no secret of other services.

All others are withheld: a child is started with `env=child_environment(...)`, never with a copy of `os.environ`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

PROGRAM = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "COLUMNS", "NO_COLOR", "LANG", "LANGUAGE", "LC_*", "TZ",
    "TMPDIR", "TEMP", "TMP", "XDG_*", "LD_*", "DYLD_*", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "COVERAGE_*",
    "OMP_*", "MKL_*", "OPENBLAS_*", "KMP_*", "GOMP_*", "RAYON_*", "MALLOC_*",
)  # fmt: skip
"""Needed by every program, or by its multithreaded libraries."""

COMPUTE = (
    "CUDA_*", "NVIDIA_*", "NCCL_*", "HIP_*", "TORCH*", "PYTORCH_*", "TRITON_*", "KINETO_*", "TOKENIZERS_*", "CC", "CXX",
    "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LORAFLEET_CACHE_DIR",
)  # fmt: skip
"""Configure torch, its kernels and their compilers."""

HUB_CACHE = ("HF_HOME", "HF_HUB_*", "TRANSFORMERS_*")
"""Locate the cache of the Hub's client."""

NETWORK = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
"""Needed to reach the network; a proxy's URL may contain a password."""

HUB = ("HF_ENDPOINT", "HF_TOKEN*", "HF_XET_*", "HUGGING_FACE_HUB_TOKEN")
S3 = ("AWS_*", "BOTO_*")
"""Configure the sources of adapters, with this fleet's credentials for them."""

DATABASE = ("PG*",)
"""Configure PostgreSQL's clients for the database of the history: PGPASSFILE, PGSSLMODE."""

FLEET_SECRETS = ("LORAFLEET_SECRET", "LORAFLEET_REDIS_URL", "REDIS_URL")
"""Read once, into `Settings`."""

SERVICES = {
    "gateway": (*PROGRAM, *HUB_CACHE, *DATABASE),
    "scheduler": PROGRAM,
    "worker": (*PROGRAM, *COMPUTE, *HUB_CACHE),
    "store": (*PROGRAM, *HUB_CACHE, *NETWORK, *HUB, *S3),
}
"""The variables that each service of the launcher inherits, besides its settings."""


def child_environment(*patterns: str) -> dict[str, str]:
    """Return this process's variables that every program needs, and those that match one of `patterns`."""
    wanted = (*PROGRAM, *patterns)
    return {name: value for name, value in os.environ.items() if _is_named(name, wanted)}


def forget_secrets(service: str) -> None:
    """Delete the secrets that a service has read or never needs from `os.environ`, so that no child inherits them.

    A gateway or worker keeps the Hub's token, since it may have to fetch the base model.
    """
    forgotten = {"store": DATABASE, "gateway": S3, "worker": (*S3, *DATABASE)}.get(service, (*HUB, *S3, *DATABASE))
    for name in list(os.environ):
        if _is_named(name, (*FLEET_SECRETS, *forgotten)):
            del os.environ[name]


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name equals one of `patterns`, or begins with one that ends with a star."""
    return any(name.startswith(pattern[:-1]) if pattern[-1] == "*" else name == pattern for pattern in patterns)
