"""The HTTP bodies that request vectors, labels or scores. LoRAX's `parameters` are the same on all routes.

Labels and scores have vLLM's forms; for ranks these are also Jina's and Cohere's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.bodies.fields import BASE, Name, Objects, Prompts, Strings
from gateway.bodies.parameter_check import JsonBody
from gateway.http.errors import FORM
from gateway.http.paths import OPENAI_FORMS
from gateway.lorax.lorax_bodies import AdapterParameters


class EmbeddingsRequest(JsonBody):
    """`POST /v1/embeddings`: OpenAI's fields, and LoRAX's `parameters`, which take precedence over `model`."""

    OBJECT = "embeddings"

    input: Prompts
    model: Name = BASE
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    background: bool | None = None
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


class ClassifyRequest(JsonBody):
    """`POST /v1/classify`, and `/classify` in vLLM's form: the labels of texts, or of one conversation."""

    OBJECT = "labels"

    model: Name = BASE
    input: Prompts | None = None
    messages: Annotated[Objects, Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    use_activation: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None


def _form(value: Any) -> str:
    is_vllm = isinstance(value, dict) and value.keys() & OPENAI_FORMS["/classify"]
    return f"{FORM}{'vllm' if is_vllm else 'lorax'}"


EitherClassifyRequest = Annotated[
    Annotated[EncoderRequest, Tag(f"{FORM}lorax")] | Annotated[ClassifyRequest, Tag(f"{FORM}vllm")],
    Discriminator(_form),
]
"""`POST /classify`, in LoRAX's or vLLM's form."""


def _number(value: Any) -> str:
    return "text" if isinstance(value, str) else "texts"


OneOrMore = Annotated[Annotated[str, Tag("text")] | Annotated[Strings, Tag("texts")], Discriminator(_number)]
"""One text, or several."""


class RerankRequest(JsonBody):
    """`POST /rerank`, `/v1/rerank` and `/v2/rerank`."""

    OBJECT = "rerank"

    model: Name = BASE
    query: str
    documents: Annotated[list[Any], Field(fail_fast=True)]  # strings, or objects with a text; see `parse_rerank`
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    use_activation: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None


class ScoreRequest(JsonBody):
    """`POST /score` and `/v1/score`. Four pairs of field names are accepted for the texts; see `parse_score`."""

    OBJECT = "score"

    model: Name = BASE
    text_1: OneOrMore | None = None
    text_2: OneOrMore | None = None
    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    items: OneOrMore | None = None
    data_1: OneOrMore | None = None
    data_2: OneOrMore | None = None
    use_activation: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
