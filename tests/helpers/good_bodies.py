"""Minimal valid bodies for every route, so that a test's change is the only odd part of a request."""

from __future__ import annotations

from typing import Any

from gateway.http.paths import RERANK, SCORE

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "base", "prompt": "hi"}

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "max_tokens": 2},
    "/v1/completions": {**COMPLETION, "max_tokens": 2},
    "/v1/embeddings": {"model": "base", "input": ["hi"]},
    "/v1/classify": {"model": "base", "input": ["hi"]},
    **{path: {"model": "base", "query": "hi", "documents": ["a", {"text": "b"}]} for path in RERANK},
    **{path: {"model": "base", "text_1": "hi", "text_2": ["a", "b"]} for path in SCORE},
    **{
        path: {"inputs": "hi", "parameters": {"max_new_tokens": 2}}
        for path in ("/", "/invocations", "/generate", "/generate_stream")
    },
    **{path: {"inputs": "hi"} for path in ("/embed", "/classify", "/tokenize")},
    "/classify_batch": {"inputs": ["hi"]},
    "/detokenize": {"tokens": [5]},
    "/api/chat": {**CHAT, "options": {"num_predict": 2}},
    "/api/generate": {**COMPLETION, "options": {"num_predict": 2}},
    "/api/embed": {"model": "base", "input": ["hi"]},
    "/api/show": {"model": "base"},
    "/v1/batches": {"input_file_id": "FILE", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/v1/messages": {**CHAT, "max_tokens": 2},
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": "base", "input": "hi", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"model": "base", "input": "hi"},
    "/v1/conversations": {"items": CHAT["messages"]},
    "/v1/conversations/{conversation_id}": {"metadata": {"a": "b"}},
    "/v1/conversations/{conversation_id}/items": {"items": CHAT["messages"]},
    "/v1/webhook_endpoints": {"name": "n", "url": "http://127.0.0.1:9/", "event_types": ["batch.expired"]},
    "/v1/webhook_endpoints/{endpoint_id}": {"name": "n"},
    "/v1/webhook_endpoints/{endpoint_id}/rotate_secret": {"keep_old_secret_active_for_24_hours": False},
    "/v1/webhook_endpoints/{endpoint_id}/test": {"event_type": "job.failed"},
    "/v1/bases": {"model": "org/x"},
    "/v1/keys": {"tenant": "nobody"},
    "/v1/tenants/{name}": {"weight": 2},
    "/v1/adapters": {"name": "mine", "source": "local:one", "wait_s": 0},
    **{f"{v1}/load_lora_adapter": {"lora_name": "one", "lora_path": "local:one"} for v1 in ("/v1", "")},
    **{f"{v1}/unload_lora_adapter": {"lora_name": "nobody"} for v1 in ("/v1", "")},
}
"""Path of a route -> a body. Names in capitals stand for objects that a test has created."""
