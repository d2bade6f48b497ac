"""The HTTP bodies of LoRAX's native API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from gateway.adapters.merged import MergedAdapters
from gateway.bodies.fields import Name, Strings
from gateway.bodies.parameter_check import JsonBody
from gateway.http.errors import FORM
from gateway.openai.openai_bodies import ChatRequest, CompletionRequest


class NativeMerge(MergedAdapters):
    """Adapters to merge for a request. `lorax.parse` validates them, with LoRAX's error messages."""

    ids: Annotated[list[Name], Field(fail_fast=True)]
    weights: Annotated[list[float], Field(fail_fast=True)] = Field(default_factory=list)


class AdapterParameters(JsonBody):
    """The adapter, its source, and the token for it."""

    OBJECT = "adapter"

    adapter_id: Name | None = None
    adapter_source: str | None = None
    merged_adapters: NativeMerge | None = None
    api_token: str | None = None


class Parameters(AdapterParameters):
    """The `parameters` of a generation. `lorax.parse` checks ranges, with LoRAX's error messages."""

    OBJECT = "parameters"

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: Strings | None = None
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    response_format: dict[str, Any] | None = None
    grammar: dict[str, Any] | None = None  # TGI's


class GenerateRequest(JsonBody):
    """`POST /generate`."""

    OBJECT = "generate"

    inputs: str
    parameters: Parameters | None = None


class StreamRequest(GenerateRequest):
    """`POST /generate_stream`."""

    OBJECT = "generate_stream"


class CompatRequest(GenerateRequest):
    """`POST /` and `/invocations`."""

    OBJECT = "compat"

    stream: bool = False


def _form(value: Any) -> str:
    given = value if isinstance(value, dict) else {}
    form = "chat" if "messages" in given else "completion" if "prompt" in given else "lorax"
    return f"{FORM}{form}"


InvocationRequest = Annotated[
    Annotated[CompatRequest, Tag(f"{FORM}lorax")]
    | Annotated[ChatRequest, Tag(f"{FORM}chat")]
    | Annotated[CompletionRequest, Tag(f"{FORM}completion")],
    Discriminator(_form),
]
"""`POST /invocations`, in LoRAX's form or one of OpenAI's."""
