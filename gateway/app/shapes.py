"""Finds the API of a request, and so its error format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.anthropic.anthropic_errors import ANTHROPIC_ERRORS
from gateway.http.errors import OPENAI_ERRORS, ErrorShape
from gateway.http.headers import header_of
from gateway.http.paths import LORAX_PATHS, MESSAGES, MODELS, OLLAMA_PREFIX
from gateway.lorax.lorax_errors import LORAX_ERRORS
from gateway.ollama.ollama_errors import OLLAMA_ERRORS

VERSION_HEADER = b"anthropic-version"


def speaks_anthropic(scope: Mapping[str, Any]) -> bool:
    """Return whether a request, given its path and headers as in an ASGI scope, uses Anthropic's API."""
    path: str = scope["path"]
    if path.startswith(MODELS) and path[len(MODELS) : len(MODELS) + 1] in ("", "/"):
        return header_of(scope["headers"], VERSION_HEADER) is not None
    return path.startswith(MESSAGES) and path[len(MESSAGES) : len(MESSAGES) + 1] in ("", "/")


def shape_of(scope: Mapping[str, Any]) -> ErrorShape:
    """Return the error format for a request."""
    path: str = scope["path"]
    if path.startswith(OLLAMA_PREFIX):
        return OLLAMA_ERRORS
    if path in LORAX_PATHS:
        return LORAX_ERRORS
    return ANTHROPIC_ERRORS if speaks_anthropic(scope) else OPENAI_ERRORS
