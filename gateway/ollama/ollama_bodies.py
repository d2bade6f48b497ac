"""The HTTP bodies of Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gateway.bodies.fields import MAX_NAME_CHARACTERS, Objects, Strings
from gateway.bodies.parameter_check import JsonBody
from gateway.openai.openai_bodies import MAX_REPETITION_WINDOW


def _whole(value: Any) -> Any:
    """Convert a float without fraction to an integer: JSON of JavaScript and Go does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]


class Options(JsonBody):
    """The `options` of a generation."""

    OBJECT = "ollama_options"

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    num_predict: Annotated[Whole, Field(ge=-2, lt=1 << 31)] | None = None
    num_ctx: Annotated[Whole, Field(ge=1, lt=1 << 31)] | None = None
    stop: str | Strings | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[Whole, Field(ge=-1, le=MAX_REPETITION_WINDOW)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


class _Request(JsonBody):
    """The fields common to `/api/chat` and `/api/generate`. null always means the default."""

    model: ModelName
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream, which is the default."""
        return self.stream is not False


class OllamaChatRequest(_Request):
    """`POST /api/chat`."""

    OBJECT = "ollama_chat"

    messages: Objects | None = None
    tools: Objects | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the request only checks that the model is available."""
        return not self.messages


class OllamaGenerateRequest(_Request):
    """`POST /api/generate`."""

    OBJECT = "ollama_generate"

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the request only checks that the model is available."""
        return not self.prompt


class EmbedRequest(JsonBody):
    """`POST /api/embed`."""

    OBJECT = "ollama_embed"

    model: ModelName
    input: str | Strings
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None


class ShowRequest(JsonBody):
    """`POST /api/show`. Older clients send `name` instead of `model`."""

    OBJECT = "ollama_show"

    model: ModelName | None = None
    name: ModelName | None = None
