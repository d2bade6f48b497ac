"""The HTTP bodies that ask an encoder, and what its numbers become in answers. Pure: no queue, no tokenizer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from gateway.lorax.api import AdapterParameters
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

EMBEDDINGS = "/v1/embeddings"

_NO_TEXT = {
    "embed": "Embedding models don't support text generation",
    "classify": "Classify models don't support text generation",
}


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class EmbeddingsRequest(_Body):
    """`POST /v1/embeddings`: OpenAI's fields, and LoRAX's `parameters`, which count instead of `model` if given."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    user: str | None = None
    parameters: AdapterParameters | None = None

    @property
    def sources(self) -> list[str | list[int]]:
        """The inputs, as texts or token ids."""
        given: Any = self.input
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given


class EncoderRequest(_Body):
    """`POST /embed` and `/classify`."""

    inputs: str
    parameters: AdapterParameters | None = None


class EncoderBatchRequest(_Body):
    """`POST /classify_batch`."""

    inputs: list[str]
    parameters: AdapterParameters | None = None


def check_task(base: m.ServedModel, wanted: m.Task) -> None:
    """Raise BadRequest, saying why, unless the base model does what is wanted."""
    if base.task == wanted:
        return
    does = {"generate": "generates text", "embed": "computes embeddings", "classify": "labels tokens"}[base.task]
    if wanted == "generate":
        raise BadRequest(f"{_NO_TEXT[base.task]}: {base.name} is an encoder ({base.model_type}) and {does}")
    needed = {"embed": "embeddings need an encoder", "classify": "labels need a token classifier"}[wanted]
    raise BadRequest(f"{base.name} ({base.model_type}) {does}; {needed} as base model", param="model")


def check_length(num_tokens: int, base: m.ServedModel) -> None:
    """Raise BadRequest for a text that is empty, or longer than the model takes."""
    if not num_tokens:
        raise BadRequest("input: a text is empty", param="input")
    if num_tokens > base.max_model_len:
        message = f"input: a text has {num_tokens} tokens; this model takes at most {base.max_model_len}"
        raise BadRequest(message, param="input", code="context_length_exceeded")


def check_native_length(num_tokens: int, base: m.ServedModel) -> None:
    """Do the same in LoRAX's words."""
    if not num_tokens:
        raise BadRequest("`inputs` cannot be empty", param="inputs")
    if num_tokens > base.max_model_len:
        message = f"`inputs` must have less than {base.max_model_len + 1} tokens. Given: {num_tokens}"
        raise BadRequest(message, param="inputs")


# ---------------------------------------------------------------- embeddings


def check_dimensions(dimensions: int | None, base: m.ServedModel) -> None:
    """Raise BadRequest for more entries than the model's vectors have."""
    if dimensions is not None and dimensions > base.width:
        message = f"dimensions is {dimensions}; this model's embeddings have {base.width} entries"
        raise BadRequest(message, param="dimensions")


def shortened(vector: np.ndarray, dimensions: int | None, *, unit_length: bool) -> np.ndarray:
    """Return the first entries of a vector (float32); where the model's have length 1, so has this."""
    if dimensions is None or dimensions == len(vector):
        return vector
    part = vector[:dimensions]
    length = float(np.linalg.norm(part))
    return part / np.float32(length) if unit_length and length else part


def embeddings_answer(
    request: EmbeddingsRequest, vectors: Sequence[np.ndarray], base: m.ServedModel, num_tokens: int
) -> dict[str, Any]:
    """Return OpenAI's answer; with numbers in it also under LoRAX's key, whose clients never ask for base64."""
    cut = [shortened(vector, request.dimensions, unit_length=base.unit_length) for vector in vectors]
    as_text = request.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector,
        }
        for index, vector in enumerate(cut)
    ]
    answer = {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return answer if as_text else {**answer, "embeddings": data}


# ---------------------------------------------------------------- entities


@dataclass(frozen=True, slots=True)
class Spans:
    """A text, and where its tokens lie in it: characters [start, end); None for tokens that are none of its own."""

    text: str
    offsets: list[tuple[int, int] | None]


@dataclass(slots=True)
class _Entity:
    tag: str
    start: int
    end: int
    scores: list[float]


def entities_of(spans: Spans, labels: np.ndarray, scores: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Return the entities that labels (int [T]) and their probabilities (float32 [T]) tell of, as LoRAX merges them.

    One begins at a `B-` label and where the tag changes; its score is the mean, its word in lower case.
    """
    found: list[_Entity] = []
    current: _Entity | None = None
    for offset, label, score in zip(spans.offsets, labels.tolist(), scores.tolist(), strict=True):
        if offset is None:
            continue
        begins, tag = _tag_of(names[label])
        if not tag:
            current = None
        elif current is None or begins or tag != current.tag:
            current = _Entity(tag, *offset, [score])
            found.append(current)
        else:
            current.end = offset[1]
            current.scores.append(score)
    return [
        {
            "entity_group": entity.tag,
            "score": sum(entity.scores) / len(entity.scores),
            "word": spans.text[entity.start : entity.end].encode().lower().decode(),  # ASCII alone, as LoRAX does
            "start": entity.start,
            "end": entity.end,
        }
        for entity in found
    ]


def _tag_of(label: str) -> tuple[bool, str]:
    """Return whether a label begins an entity, and the entity's tag, "" for no entity."""
    if label == "O":
        return False, ""
    prefix, dash, tag = label.partition("-")
    return (prefix == "B", tag) if dash and prefix in ("B", "I") else (False, label)
