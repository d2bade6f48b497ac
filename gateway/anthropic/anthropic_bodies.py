"""The HTTP bodies of Anthropic's routes. `content.py` validates messages and tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.bodies.fields import MAX_NAME_CHARACTERS, Objects, Strings
from gateway.bodies.parameter_check import JsonBody

MIN_THINKING_TOKENS = 1024  # Anthropic's limit


class ThinkingConfig(JsonBody):
    """Whether the model reasons before it answers."""

    OBJECT = "thinking"

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING_TOKENS, lt=1 << 31)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(JsonBody):
    """The format of the answer, and the effort for it."""

    OBJECT = "output_config"

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class ToolChoiceConfig(JsonBody):
    """Which tools may or must be called."""

    OBJECT = "messages_tool_choice"

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(JsonBody):
    """`POST /v1/messages/count_tokens`: the fields that determine a prompt."""

    OBJECT = "count_tokens"

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    messages: Annotated[Objects, Field(min_length=1)]
    system: str | Objects | None = None
    tools: Objects | None = None
    tool_choice: ToolChoiceConfig | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None  # output_config.format under its name in the beta API
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`. null always means the default."""

    OBJECT = "messages"

    max_tokens: Annotated[int, Field(ge=0)]
    stop_sequences: Strings | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
