"""Error messages for unknown URLs: similar routes, or why another server's route is not served. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from starlette.routing import BaseRoute, Route

from gateway.http.paths import MESSAGES, RESPONSES

MAX_COMPARED = 100
"""Maximum characters of a path compared with the routes, which takes up to 3 ms: so it costs as much as a list."""

MAX_SUGGESTED = 3

_CHAT = "/v1/chat/completions"
_ADAPTERS = "GET /v1/adapters shows where each adapter is loaded; its routes preload, pin, evict and unload adapters"
_REGISTER = "POST /v1/adapters serves an adapter under a name, DELETE /v1/adapters/NAME ends that; /api/tags lists all"
_HEALTH = "/health says whether requests are served"

NOT_SERVED = {
    "/v1": f"it is where OpenAI's routes begin, and the base URL of their clients: POST {_CHAT}, GET /v1/models",
    "/pooling": "per-token outputs are not supported: /v1/embeddings, /v1/classify and /v1/score return those of texts",
    "/inference/v1/generate": f"this API is not supported: use {_CHAT}, {RESPONSES}, {MESSAGES} or /api/chat",
    f"{RESPONSES}/compact": "conversations are not compacted: truncation auto drops the earliest messages of a prompt,"
    " and items of a conversation can be deleted",
    f"{MESSAGES}/batches": f"batches of messages are not supported: send each to {MESSAGES}",
    "/v1/complete": f"the API before {MESSAGES} is not supported",
    **dict.fromkeys(
        ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations"),
        "models here read and generate text only",
    ),
    **dict.fromkeys(
        ("/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused", "/release_memory_occupation",
         "/resume_memory_occupation"),
        f"workers have no sleep mode: {_HEALTH}, and evicting adapters frees their memory",
    ),
    **dict.fromkeys(
        ("/reset_prefix_cache", "/reset_mm_cache", "/flush_cache"),
        "prefix caches are separated by tenant and content, and never need a reset",
    ),
    **dict.fromkeys(
        ("/get_model_info", "/model_info", "/get_server_info", "/server_info"),
        "/info and /v1/models show the served model, /metrics the state of the fleet",
    ),
    "/health_generate": f"{_HEALTH}, and /startup generates a token",
    **dict.fromkeys(
        ("/load_lora_adapter_from_tensors", "/update_weights", "/update_weights_from_disk",
         "/update_weights_from_tensor", "/update_weights_from_distributed", "/init_weights_update_group",
         "/destroy_weights_update_group", "/update_named_param", "/batch_update_named_params", "/init_communicator",
         "/close_communicator", "/get_world_size", "/init_broadcaster", "/reload_weights", "/get_weights_by_name",
         "/skyrl/v1/load_lora_adapter"),
        "the base's weights are fixed, and adapters cannot be sent as tensors. Write the adapter to a folder of"
        " --adapter-roots and POST /load_lora_adapter, which loads it in place; or POST it as a zip to"
        " /v1/adapters/upload",
    ),
    **dict.fromkeys(
        ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"),
        f"models are not created here. {_REGISTER}",
    ),
    "/api/embeddings": "use /api/embed, if the base model is an encoder",
    "/collective_rpc": f"workers cannot be reached from outside. {_ADAPTERS}",
}  # fmt: skip
"""Path of another server's API -> why it is not served, or what replaces it."""


def unknown_url(method: str, path: str, routes: Iterable[BaseRoute]) -> str:
    """Return the error message for a path without a route."""
    text = f"Unknown request URL: {method} {path}."
    reason = NOT_SERVED.get(path.rstrip("/"))
    if reason is not None:
        return f"{text} It is not served: {reason}."
    served = {route.path: route for route in routes if isinstance(route, Route)}
    near = get_close_matches(path, served, MAX_SUGGESTED) if len(path) <= MAX_COMPARED else []
    if not near:
        return f"{text} /openapi.json lists what is served."
    shown = [f"{'/'.join(sorted(served[known].methods or ()))} {known}" for known in near]
    return f"{text} Did you mean {' or '.join(shown)}? /openapi.json lists what is served."
