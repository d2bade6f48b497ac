"""The HTTP bodies that ask an encoder. LoRAX's `parameters` are the same on its routes and OpenAI's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.bodies.fields import Name, Prompts, Strings
from gateway.bodies.parameter_check import JsonBody
from gateway.lorax.bodies import AdapterParameters


class EmbeddingsRequest(JsonBody):
    """`POST /v1/embeddings`: OpenAI's fields, and LoRAX's `parameters`, which count instead of `model` if given."""

    OBJECT = "embeddings"

    input: Prompts
    model: Name
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    parameters: AdapterParameters | None = None


class EncoderRequest(JsonBody):
    """`POST /embed` and `/classify`."""

    OBJECT = "encode"

    inputs: str
    parameters: AdapterParameters | None = None


class EncoderBatchRequest(JsonBody):
    """`POST /classify_batch`."""

    OBJECT = "encode_batch"

    inputs: Strings
    parameters: AdapterParameters | None = None
