"""The paths that ask the model for something: declared once for routes, admission and metrics."""

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
"""What is below it, too, answers and refuses in Anthropic's way."""

RESPONSES = "/v1/responses"
INPUT_TOKENS = f"{RESPONSES}/input_tokens"
CONVERSATIONS = "/v1/conversations"

COUNT_TOKENS = f"{MESSAGES}/count_tokens"

MODELS = "/v1/models"
"""It, and what is below it, answers in Anthropic's way whoever sends `anthropic-version`, else in OpenAI's."""

OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED = "/api/chat", "/api/generate", "/api/embed"
OLLAMA_PREFIX = "/api/"
"""What is below it answers and refuses in Ollama's way."""

GENERATION_PATHS = (
    frozenset({CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY, MESSAGES, RESPONSES, *RERANK, *SCORE})
    | {OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED}
    | LORAX_GENERATE
    | LORAX_ENCODE
)
"""A POST to one of these is a call, which goes into the queue."""

FILES, BATCHES, WEBHOOKS = "/v1/files", "/v1/batches", "/v1/webhook_endpoints"

REQUESTS = "/v1/requests"

WORKERS, DEAD_LETTERS, KEYS, TENANTS = "/v1/workers", "/v1/dead_letters", "/v1/keys", "/v1/tenants"
AUDIT = "/v1/audit"
"""They, and what is below them, are for operators alone."""

CONSOLE = "/console"
"""It, and what is below it, are the console's files."""

DOCS = "/docs"
"""It, and what is below it, shows `/openapi.json` in a browser, and needs a key where that does."""

UPLOAD = "/v1/adapters/upload"

FLEET = "/v1/fleet"
"""What starts and stops workers asks it: how many requests there are, and workers for them."""

BATCH_ENDPOINTS = frozenset(path for path in GENERATION_PATHS if path.startswith("/v1/"))
"""What the lines of a batch may ask."""

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
PING = "/ping"

TOKENIZER_PATHS = frozenset({TOKENIZE, DETOKENIZE, COUNT_TOKENS, INPUT_TOKENS})
"""A POST to one of these works on a text, but is no call."""

LARGE_BODY_PATHS = GENERATION_PATHS | TOKENIZER_PATHS
"""Only these take bodies of more than SMALL_BODY_BYTES."""

SMALL_BODY_BYTES = 1 << 16
"""Bodies up to this size wait for no place: none costs more than a few milliseconds."""

LORAX_PATHS = LORAX_GENERATE | LORAX_ENCODE | {TOKENIZE, "/info", PING, "/startup"}
"""Routes that answer and refuse in LoRAX's way."""

INVOCATIONS = "/invocations"

OPENAI_FORMS = {
    TOKENIZE: {"prompt", "messages"}, "/classify": {"input", "messages"}, INVOCATIONS: {"prompt", "messages"}
}  # fmt: skip
"""Paths of LoRAX's that also take a body in OpenAI's or vLLM's form -> the fields that tell it by.

Its errors are OpenAI's.
"""
