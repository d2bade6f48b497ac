"""The paths that more than one module names. What a route asks of its callers is declared with it: `access.py`."""

from __future__ import annotations

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
CLASSIFY = "/v1/classify"
RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
SCORE = ("/score", "/v1/score")

LORAX_GENERATE = frozenset({"/", "/generate", "/generate_stream", "/invocations"})
LORAX_ENCODE = frozenset({"/embed", "/classify", "/classify_batch"})

MESSAGES = "/v1/messages"
"""This path and those below it answer in Anthropic's form, errors too."""

RESPONSES = "/v1/responses"
INPUT_TOKENS = f"{RESPONSES}/input_tokens"
CONVERSATIONS = "/v1/conversations"

COUNT_TOKENS = f"{MESSAGES}/count_tokens"

MODELS = "/v1/models"
"""These routes answer in Anthropic's form to clients that send `anthropic-version`, and in OpenAI's to others."""

OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED = "/api/chat", "/api/generate", "/api/embed"
OLLAMA_PREFIX = "/api/"
"""Paths below it answer in Ollama's form, errors too."""

FILES, BATCHES, WEBHOOKS = "/v1/files", "/v1/batches", "/v1/webhook_endpoints"

REQUESTS = "/v1/requests"

BASES = "/v1/bases"
WORKERS, DEAD_LETTERS, KEYS, TENANTS = "/v1/workers", "/v1/dead_letters", "/v1/keys", "/v1/tenants"
AUDIT = "/v1/audit"
TIMESERIES = "/v1/timeseries"

CONSOLE = "/console"
"""This path and those below it are the console's files."""

DOCS = "/docs"
"""It, and what is below it, shows `/openapi.json` in a browser, and needs a key where that does."""

UPLOAD = "/v1/adapters/upload"

FLEET = "/v1/fleet"
"""What starts and stops workers asks it: how many requests there are, and workers for them."""

BATCH_ENDPOINTS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY, MESSAGES, RESPONSES, RERANK[1], SCORE[1]})
"""What the lines of a batch may ask."""

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
PING = "/ping"

SMALL_BODY_BYTES = 1 << 16
"""Bodies up to this size need no slot: none costs more than a few milliseconds."""

LORAX_PATHS = LORAX_GENERATE | LORAX_ENCODE | {TOKENIZE, "/info", PING, "/startup"}
"""Routes that answer and refuse in LoRAX's way."""

INVOCATIONS = "/invocations"

OPENAI_FORMS = {
    TOKENIZE: {"prompt", "messages"},
    "/classify": {"input", "messages"},
    INVOCATIONS: {"prompt", "messages"},
}
"""Paths of LoRAX's that also take a body in OpenAI's or vLLM's form -> the fields that identify it.

Its errors are OpenAI's.
"""

PROBES = frozenset({"/health", PING})
"""Routes that programs poll to check a gateway's health: cheap, and exempt from limits on reads."""

LISTS = frozenset(
    {
        MODELS,
        "/info",
        "/metrics",
        "/api/tags",
        "/api/ps",
        "/v1/adapters",
        "/v1/jobs",
        "/v1/usage",
        FILES,
        BATCHES,
        WEBHOOKS,
    }
    | {REQUESTS, BASES, WORKERS, DEAD_LETTERS, KEYS, TENANTS, AUDIT, TIMESERIES}
)
"""A GET of one of these is put together of many things, and costs more than another."""
