"""The HTTP bodies of the Responses and Conversations APIs. `items.py` validates items, `tools.py` tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.bodies.fields import BASE, Name, Objects, Strings
from gateway.bodies.parameter_check import JsonBody
from gateway.openai.openai_bodies import MAX_LORA_SCALE, MAX_METADATA_KEY, MAX_METADATA_PAIRS, MAX_METADATA_VALUE

MAX_ID_CHARACTERS = 100

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=MAX_METADATA_KEY)], Annotated[str, Field(max_length=MAX_METADATA_VALUE)]],
    Field(max_length=MAX_METADATA_PAIRS),
]


class TextConfig(JsonBody):
    """The format of the answer's text."""

    OBJECT = "response_text"

    format: dict[str, Any] | None = None


class ReasoningConfig(JsonBody):
    """How much the model reasons."""

    OBJECT = "response_reasoning"

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ConversationRef(JsonBody):
    """The conversation that a response continues."""

    OBJECT = "response_conversation"

    id: Annotated[str, Field(max_length=MAX_ID_CHARACTERS)]


class PromptRequest(JsonBody):
    """The fields that determine a response's prompt. null always means the default."""

    model: Name = BASE
    input: str | Objects | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=MAX_ID_CHARACTERS)] | None = None
    conversation: Annotated[str, Field(max_length=MAX_ID_CHARACTERS)] | ConversationRef | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's


class InputTokensRequest(PromptRequest):
    """`POST /v1/responses/input_tokens`."""

    OBJECT = "input_tokens"


class ResponseRequest(PromptRequest):
    """`POST /v1/responses`."""

    OBJECT = "response"

    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include: Strings | None = None
    service_tier: Literal["auto", "default", "flex"] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None  # this and the next are vLLM's
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop: str | Strings | None = None
    lora_scale: Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)] | None = None


def conversation_id_of(request: PromptRequest) -> str:
    """Return the id of the conversation that a response continues, "" for none."""
    given = request.conversation
    return given.id if isinstance(given, ConversationRef) else given or ""


class ConversationRequest(JsonBody):
    """`POST /v1/conversations`."""

    OBJECT = "conversation"

    items: Objects | None = None
    metadata: Metadata | None = None


class ConversationChange(JsonBody):
    """`POST /v1/conversations/{id}`. null removes the metadata."""

    OBJECT = "conversation_change"

    metadata: Metadata | None


class NewItems(JsonBody):
    """`POST /v1/conversations/{id}/items`."""

    OBJECT = "new_items"

    items: Objects
