"""The paths used by more than one module. `access.py` has the rules for access to them."""

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
"""This path and those below it use Anthropic's formats, also for errors."""

RESPONSES = "/v1/responses"
INPUT_TOKENS = f"{RESPONSES}/input_tokens"
CONVERSATIONS = "/v1/conversations"

COUNT_TOKENS = f"{MESSAGES}/count_tokens"

MODELS = "/v1/models"
"""These routes use Anthropic's format for clients that send `anthropic-version`, and OpenAI's for others."""

OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED = "/api/chat", "/api/generate", "/api/embed"
OLLAMA_PREFIX = "/api/"
"""Paths below it use Ollama's formats, also for errors."""

FILES, BATCHES, WEBHOOKS = "/v1/files", "/v1/batches", "/v1/webhook_endpoints"

REQUESTS = "/v1/requests"

BASES = "/v1/bases"
WORKERS, DEAD_LETTERS, KEYS, TENANTS = "/v1/workers", "/v1/dead_letters", "/v1/keys", "/v1/tenants"
AUDIT = "/v1/audit"
TIMESERIES = "/v1/timeseries"

CONSOLE = "/console"
"""This path and those below it serve the console's files."""

DOCS = "/docs"
"""This path and those below it show `/openapi.json` in a browser, with the same access rules."""

UPLOAD = "/v1/adapters/upload"

FLEET = "/v1/fleet"
"""The number of requests and of workers needed, for autoscalers."""

BATCH_ENDPOINTS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY, MESSAGES, RESPONSES, RERANK[1], SCORE[1]})
"""Endpoints that a batch's lines may call."""

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
PING = "/ping"

SMALL_BODY_BYTES = 1 << 16
"""Bodies up to this size need no slot: processing one takes at most a few milliseconds."""

LORAX_PATHS = LORAX_GENERATE | LORAX_ENCODE | {TOKENIZE, "/info", PING, "/startup"}
"""Routes that use LoRAX's formats, also for errors."""

INVOCATIONS = "/invocations"

OPENAI_FORMS = {
    TOKENIZE: {"prompt", "messages"},
    "/classify": {"input", "messages"},
    INVOCATIONS: {"prompt", "messages"},
}
"""LoRAX's paths that also accept a body in OpenAI's or vLLM's format -> the fields that identify it. Errors of such
bodies are in OpenAI's format."""

PROBES = frozenset({"/health", PING})
"""Routes polled to check a gateway's health: cheap, and exempt from read limits."""

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
"""Routes whose GET combines many records, and so has a higher read cost."""
