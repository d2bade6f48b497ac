"""The paths that ask the model for something: declared once for routes, admission and metrics."""

from __future__ import annotations

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"

LORAX_GENERATE = frozenset({"/", "/generate", "/generate_stream", "/invocations"})
LORAX_ENCODE = frozenset({"/embed", "/classify", "/classify_batch"})

GENERATION_PATHS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS}) | LORAX_GENERATE | LORAX_ENCODE
"""A POST to one of these is a call, which goes into the queue."""

LORAX_PATHS = LORAX_GENERATE | LORAX_ENCODE | {"/tokenize", "/info", "/ping", "/startup"}
"""Routes that answer and refuse in LoRAX's way."""
