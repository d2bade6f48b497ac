"""The responses in `/openapi.json`: error formats, and the statuses and media types of each route.

Routes write their responses as bytes; nothing here runs for a request. `make api-check` compares the two.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, create_model
from starlette.responses import Response

JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"

Responses = dict[int | str, dict[str, Any]]


class EventStream(Response):
    """Server-sent events."""

    media_type = EVENTS


class PlainText(Response):
    """A text that is not JSON."""

    media_type = "text/plain"


def _model(name: str, about: str, /, **fields: Any) -> type[BaseModel]:
    """Return a model shown under its name. fields: types; an optional field is a pair of type and default."""
    types: dict[str, Any] = {key: kind if isinstance(kind, tuple) else (kind, ...) for key, kind in fields.items()}
    return create_model(name, __doc__=about, **types)


def _found(name: str, about: str, /, **fields: Any) -> Responses:
    return {200: {"model": _model(name, about, **fields)}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _errors(schema: dict[str, Any]) -> Responses:
    return {status: _json("An error", schema) for status in ("4XX", "5XX")}


_ANY, _ROWS, _COUNTS, _OR_NONE = dict[str, Any], list[dict[str, Any]], dict[str, int], (str | None, None)

_TEXT = {"type": "string"}
_NUMBER, _INTEGER = {"type": "number"}, {"type": "integer"}
_MAYBE = {"type": ["string", "null"]}
_EVENTS = {EVENTS: {"schema": _object(data=_TEXT)}}  # schema of one event, as in OpenAPI 3.2; schemathesis reads it so

_OPENAI_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))
_NATIVE_ERROR = _object(error=_TEXT, error_type=_TEXT)
OPENAI = _errors(_OPENAI_ERROR)
NATIVE = _errors(_NATIVE_ERROR)
EITHER = _errors({"anyOf": [_OPENAI_ERROR, _NATIVE_ERROR]})
"""Errors of routes that accept both LoRAX's bodies and OpenAI's."""
_ANTHROPIC = _errors(_object(type=_TEXT, error=_object(type=_TEXT, message=_TEXT), request_id=_MAYBE))
_MESSAGE = _model(
    "Message",
    "A message of Anthropic's API.",
    id=str,
    type=str,
    role=str,
    model=str,
    content=_ROWS,
    stop_reason=str | None,
    stop_sequence=str | None,
    usage=_COUNTS,
)
MESSAGES: Responses = {200: {"model": _MESSAGE, "content": _EVENTS}, **_ANTHROPIC}
COUNTED: Responses = {**_found("Counted", "The tokens of a prompt.", input_tokens=int), **_ANTHROPIC}
_HEALTH = _model(
    "Health",
    "The readiness of the fleet.",
    status=str,
    workers=int,
    history=_OR_NONE,
    error=_OR_NONE,
    error_type=_OR_NONE,
)
HEALTH: Responses = {200: {"model": _HEALTH}, 503: {"model": _HEALTH, "description": "The fleet is not ready"}}
PAGE = _found("Page", "A list.", object=str, data=_ROWS)
_MODELS = {"type": "object", "required": ["data"], "properties": {"data": {"type": "array"}}}
MODELS: Responses = {200: _json("OpenAI's list or, with the header anthropic-version, a page of Anthropic's", _MODELS)}
JOB = _found(
    "Job", "A background job.", id=str, object=str, status=str, created_at=int, result=(dict[str, Any] | None, None)
)
_LATER_JOB: Responses = {202: {**JOB[200], "description": "A background job"}}
DELETED = _found("Deleted", "A deleted object.", id=str, object=str, deleted=bool)
LATER: Responses = {202: _json("Accepted; it is not done yet", {"type": "object"})}
REGISTERED: Responses = {201: _json("A new name is served", {"type": "object"}), **LATER}
STREAMED: Responses = {200: {"content": _EVENTS}}
_USAGE = _model("Usage", "Tokens of a call.", prompt_tokens=int, completion_tokens=int, total_tokens=int)
_GENERATED = _model(
    "Generated",
    "A chat completion, or a text completion.",
    id=str,
    object=str,
    created=int,
    model=str,
    system_fingerprint=str,
    choices=_ROWS,
    usage=_USAGE,
)
GENERATED: Responses = {200: {"model": _GENERATED, "content": _EVENTS}, **_LATER_JOB}
_EMBEDDINGS = _found(
    "Embeddings",
    "Embeddings; `embeddings` is LoRAX's key for the same, left out with base64.",
    object=str,
    data=_ROWS,
    model=str,
    usage=_COUNTS,
    embeddings=(_ROWS | None, None),
)
EMBEDDINGS: Responses = {**_EMBEDDINGS, **_LATER_JOB}
RESPONSE = _found(
    "ResponseObject",
    "A response of OpenAI's Responses API.",
    id=str,
    object=str,
    created_at=int,
    status=str,
    model=str,
    output=_ROWS,
    usage=(dict[str, Any] | None, None),
)
RESPONDED: Responses = {200: {**RESPONSE[200], "content": _EVENTS}}
INPUT_TOKENS = _found("InputTokens", "The tokens of a response's prompt.", object=str, input_tokens=int)
CONVERSATION = _found(
    "Conversation", "A stored conversation.", id=str, object=str, created_at=int, metadata=dict[str, str]
)
ITEM = _found("Item", "An item of a conversation.", id=str, type=str)
_LABELLED = _model(
    "Labels",
    "The labels of texts, in vLLM's form.",
    id=str,
    object=str,
    created=int,
    model=str,
    data=_ROWS,
    usage=dict[str, int | None],
)
LABELS: Responses = {200: {"model": _LABELLED}}
RANKS = _found(
    "Ranks",
    "Documents in the order of their relevance, in Jina's and Cohere's form.",
    id=str,
    model=str,
    usage=_COUNTS,
    results=_ROWS,
)
SCORES = _found(
    "Scores",
    "The scores of pairs of texts, in vLLM's form.",
    id=str,
    object=str,
    created=int,
    model=str,
    data=_ROWS,
    usage=_COUNTS,
)
EMBEDDING: Responses = {**_found("Embedding", "LoRAX's embedding of one text.", embeddings=list[float]), **NATIVE}
_ENTITIES = {
    "type": "array",
    "items": _object(entity_group=_TEXT, score=_NUMBER, word=_TEXT, start=_INTEGER, end=_INTEGER),
}
_LABELS = {"type": "array", "items": _object(label=_TEXT, score=_NUMBER)}
_OF_TEXT = {"anyOf": [_ENTITIES, _LABELS]}
ENTITIES: Responses = {
    200: _json(
        "The entities or the labels of a text; to `input` and `messages` vLLM's answer",
        {"anyOf": [*_OF_TEXT["anyOf"], _LABELLED.model_json_schema()]},
    ),
    **EITHER,
}
ENTITIES_OF_SEVERAL: Responses = {
    200: _json("The entities or the labels of each text", {"type": "array", "items": _OF_TEXT}),
    **NATIVE,
}
FILE = _found(
    "File",
    "A file.",
    id=str,
    object=str,
    bytes=int,
    created_at=int,
    expires_at=int,
    filename=str,
    purpose=str,
    status=str,
)
BATCH = _found(
    "Batch",
    "A batch.",
    id=str,
    object=str,
    endpoint=str,
    input_file_id=str,
    completion_window=str,
    status=str,
    created_at=int,
    expires_at=int,
    request_counts=_COUNTS,
    output_file_id=_OR_NONE,
    error_file_id=_OR_NONE,
)
WEBHOOK = _found(
    "Webhook",
    "An endpoint of webhooks; only its creation returns its secret.",
    id=str,
    object=str,
    name=str,
    url=str,
    event_types=list[str],
    created_at=int,
    updated_at=int,
    signing_secret=_OR_NONE,
)
WEBHOOK_TEST = _found(
    "WebhookTested",
    "What an endpoint of webhooks has answered.",
    object=str,
    webhook_endpoint_id=str,
    event_type=str,
    status_code=int,
    success=bool,
)
DELIVERY = _found(
    "Delivery",
    "A webhook that was given up, or is sent again.",
    id=str,
    object=str,
    webhook_endpoint_id=str,
    event_id=str,
    event_type=str,
    created_at=int,
    attempts=int,
)
NAMES = _found("Names", "A list of names.", object=str, data=list[str])
CONTENT: Responses = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
ZIP: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
}
METRICS: Responses = {200: {"content": {"text/plain": {"schema": _TEXT}}}}
_TOKENS = {"type": "array", "items": _object(id=_INTEGER, text=_TEXT, start=_INTEGER, stop=_INTEGER)}
_COUNTED = _object(
    count=_INTEGER,
    max_model_len=_INTEGER,
    tokens={"type": "array", "items": _INTEGER},
    token_strs={"type": ["array", "null"], "items": _TEXT},
)
TOKENIZED: Responses = {
    200: _json("LoRAX's answer to `inputs`, vLLM's to others", {"anyOf": [_TOKENS, _COUNTED]}),
    **EITHER,
}
DETOKENIZED = _found("Detokenized", "The text of token ids, in vLLM's form.", prompt=str)
_KNOWN = "What transformers knows of the base model's tokenizer, and its chat template."
TOKENIZER_INFO = _found("TokenizerInfo", _KNOWN, tokenizer_class=str)
VERSION = _found("Version", "The version of this server.", version=str)
LOAD = _found("Load", "The calls that this gateway is answering.", server_load=int)
FLEET = _found(
    "Fleet",
    "The load of the fleet.",
    object=str,
    workers=int,
    queued=int,
    running=int,
    demand=int,
    compute=dict[str, str | None] | None,
)
WORKER: Responses = {200: _json("A worker", _object(id=_TEXT, object=_TEXT, name=_MAYBE, state=_TEXT))}
WORKER[202] = {**WORKER[200], "description": "Requested; the worker has not confirmed it yet"}
BASE: Responses = {
    status: _json(text, _object(id=_TEXT, object=_TEXT, model=_TEXT, added={"type": "boolean"}, state=_TEXT))
    for status, text in ((201, "A base that was added"), (200, "It was already added"))
}
LETTER: Responses = {
    200: _json("A dead letter: a request that failed too often", _object(id=_TEXT, object=_TEXT, reason=_TEXT))
}
RETRIED: Responses = {200: _json("It was requeued", _object(id=_TEXT, object=_TEXT, request=_TEXT))}
NEW_KEY: Responses = {201: _json("A new key, and its secret", _object(id=_TEXT, object=_TEXT, secret=_TEXT))}
TENANT: Responses = {200: _json("A tenant and its limits", _object(id=_TEXT, object=_TEXT, weight=_NUMBER))}
_CANCELLED = {"type": "array", "items": _object(id=_TEXT, state=_MAYBE)}
CANCELLED: Responses = {
    200: _json(
        "Cancellation was requested for those that had not ended", _object(id=_TEXT, object=_TEXT, requests=_CANCELLED)
    )
}
_HAPPENED = _object(ms=_INTEGER, event=_TEXT, text=_TEXT)
EXPLAINED: Responses = {
    200: _json(
        "The state and timeline of a request",
        _object(
            id=_TEXT, object=_TEXT, call=_TEXT, state=_TEXT, prompt_tokens=_INTEGER, output_tokens=_INTEGER,
            attempts=_INTEGER, timeline={"type": "array", "items": _HAPPENED},
            text={
                "type": ["object", "null"],
                "description": "its prompt and output as they are kept with --history-text; null: they are not",
                "properties": {
                    "prompt": _MAYBE, "output": _MAYBE, "is_cut": {"type": "boolean"}, "problem": _MAYBE,
                },
            },
        ),
    )
}  # fmt: skip
REPLAYED: Responses = {
    200: _json(
        "A replay compared with the original request",
        _object(id=_TEXT, replay=_TEXT, equal={"type": "boolean"}, tokens=_INTEGER, tokens_now=_INTEGER),
    )
}
_USED = _object(object=_TEXT, input_tokens=_INTEGER, output_tokens=_INTEGER, num_model_requests=_INTEGER)
_BUCKET = _object(object=_TEXT, start_time=_INTEGER, end_time=_INTEGER, results={"type": "array", "items": _USED})
USAGE: Responses = {
    200: {
        "description": "Usage by day",
        "content": {
            JSON: {"schema": _object(object=_TEXT, data={"type": "array", "items": _BUCKET})},
            "text/csv": {},
        },
    }
}
_COLUMN = {"type": "array", "items": {"type": ["number", "null"]}}
_SERIES = _object(
    name=_MAYBE, group=_MAYBE, requests=_COLUMN, prompt_tokens=_COLUMN, output_tokens=_COLUMN, refused=_COLUMN,
    client_errors=_COLUMN, server_errors=_COLUMN, hits=_COLUMN, misses=_COLUMN, ttft_p50_ms=_COLUMN,
    ttft_p95_ms=_COLUMN,
)  # fmt: skip
TIMESERIES: Responses = {
    200: _json(
        "Values per period of `step_s` seconds from `start_time` (unix time) on; null where nothing was measured",
        _object(
            object=_TEXT, start_time=_INTEGER, step_s=_INTEGER, num=_INTEGER, elapsed_s=_INTEGER, range=_TEXT,
            gateways=_INTEGER, source=_TEXT, ranges={"type": "array", "items": _TEXT}, note=_MAYBE,
            fleet={"type": ["object", "null"], "additionalProperties": _COLUMN},
            groups={"type": "array", "items": _SERIES},
        ),
    )
}  # fmt: skip
OLLAMA = _errors(_object(error=_TEXT))
OLLAMA_GENERATED: Responses = {
    200: {
        "description": "One object, or one on each line",
        "content": {JSON: {"schema": _object(model=_TEXT, created_at=_TEXT, done={"type": "boolean"})}, LINES: {}},
    },
    **OLLAMA,
}
OLLAMA_MODELS: Responses = {**_found("OllamaModels", "Models as Ollama lists them.", models=_ROWS), **OLLAMA}
