"""Which API's errors a path has."""

from __future__ import annotations

from gateway.http.errors import OPENAI_ERRORS, ErrorShape
from gateway.http.paths import LORAX_PATHS, OLLAMA_PREFIX
from gateway.lorax.errors import LORAX_ERRORS
from gateway.ollama.errors import OLLAMA_ERRORS


def shape_of(path: str) -> ErrorShape:
    """Return how errors on a path are written."""
    if path.startswith(OLLAMA_PREFIX):
        return OLLAMA_ERRORS
    return LORAX_ERRORS if path in LORAX_PATHS else OPENAI_ERRORS
