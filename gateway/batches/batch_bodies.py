"""The body of `POST /v1/batches`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.bodies.parameter_check import JsonBody
from gateway.files.files import MAX_LIFE_S, MIN_LIFE_S
from gateway.openai.openai_bodies import MAX_METADATA_KEY, MAX_METADATA_PAIRS, MAX_METADATA_VALUE

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=MAX_METADATA_KEY)], Annotated[str, Field(max_length=MAX_METADATA_VALUE)]],
    Field(max_length=MAX_METADATA_PAIRS),
]


class OutputExpiry(JsonBody):
    """When the output files expire."""

    OBJECT = "output_expiry"

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_LIFE_S, le=MAX_LIFE_S)]


class BatchRequest(JsonBody):
    """`POST /v1/batches`."""

    OBJECT = "batch"

    input_file_id: Annotated[str, Field(max_length=200)]
    endpoint: Annotated[str, Field(max_length=200)]
    completion_window: Annotated[str, Field(max_length=20)]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None
