"""*Write* for encoders: an answer made from the numbers in the logs, once all texts of a call are computed."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from gateway.answers.sse import GenerationAnswer
from gateway.bodies.json_slices import RowSlices
from gateway.calls.choices import Choice, Piece
from gateway.calls.follow import Generation
from gateway.calls.submit import SubmittedCall
from gateway.calls.tokenize import Offset
from gateway.calls.writers import CallUsage, Writer
from gateway.encoders.encoder_bodies import EmbeddingsRequest, EncoderBatchRequest, EncoderRequest
from gateway.encoders.encoder_parse import EncoderRules
from gateway.http.errors import OPENAI_ERRORS
from gateway.lorax.lorax_errors import LORAX_GENERATION_ERRORS
from gateway.lorax.lorax_write import compute_type, times_of
from protocol.runtime.imports import Late
from protocol.wire import messages as m
from protocol.wire.errors import Unavailable

if TYPE_CHECKING:
    import numpy as np
else:
    np = Late("numpy")

FEW_NUMBERS = 1 << 14
"""Maximum numbers of an answer that is written in one piece, which takes a few milliseconds."""

VECTORS = 4
"""Vectors, or texts' entities, written at a time."""

CLASSIFY_HEADERS = ("x-compute-time", "x-validation-time", "x-queue-time", "x-inference-time")

Write: TypeAlias = "Callable[[list[np.ndarray], Generation], Any]"
"""Converts the numbers of each text (int32; floats are stored bit by bit) to the answer's JSON."""


class EncoderAnswer(GenerationAnswer):
    """The answer to a call of an encoder."""

    def __init__(self, generation: Generation, write: Write, *, native: bool) -> None:
        """native: errors have LoRAX's format."""
        super().__init__(generation, Writer())
        self._write = write
        self.errors = LORAX_GENERATION_ERRORS if native else OPENAI_ERRORS

    async def whole(self, choices: list[Piece]) -> tuple[Any, dict[str, str]]:
        """Return the answer and its headers."""
        numbers = [np.frombuffer(choice.shown[0], "<i4") for choice in self.generation.choices]
        return self._write(numbers, self.generation), await self.own_headers()

    @property
    def is_large(self) -> bool:
        """Whether the answer takes long to write."""
        return sum(choice.cursor.next for choice in self.generation.choices) > FEW_NUMBERS

    async def own_headers(self) -> dict[str, str]:
        """Return the additional headers of the answer."""
        return {}


class ClassifyAnswer(EncoderAnswer):
    """The answer to a call for labels, with LoRAX's headers for times."""

    def __init__(self, generation: Generation, write: Write, started_s: float) -> None:
        """Store the arrival of the call. started_s: monotonic."""
        super().__init__(generation, write, native=True)
        self._started_s = started_s

    async def own_headers(self) -> dict[str, str]:
        """Return the additional headers of the answer."""
        times = await times_of(self.generation, self._started_s)
        return {"x-compute-type": compute_type(_base(self.generation)), **{key: times[key] for key in CLASSIFY_HEADERS}}


class EmbeddingsWriter(Writer):
    """Writes the embeddings of a job."""

    def __init__(self, call: SubmittedCall, choices: Sequence[Choice]) -> None:
        """Raise Unavailable while the base model is unknown, which is needed to decode its vectors."""
        if call.base is None:
            raise Unavailable("no worker has reported its model to this gateway yet", code="no_worker")
        self._base = call.base
        self._model = call.parsed.model_name
        self._rules = call.parsed.rules
        self._choices = choices

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer that the endpoint would have returned."""
        rules = self._rules
        assert isinstance(rules, EncoderRules)
        request = EmbeddingsRequest(
            input="",
            model=self._model,
            dimensions=rules.dimensions,
            encoding_format="base64" if rules.as_base64 else "float",
        )
        vectors = [np.frombuffer(choice.shown[0], "<f4") for choice in self._choices]
        return embeddings_answer(request, vectors, self._base, usage.prompt_tokens)


def write_embeddings(request: EmbeddingsRequest) -> Write:
    """Return a function that writes the answer of `/v1/embeddings`."""
    light = request.model_copy(update={"input": ""})  # frees the texts before the answer

    def write(numbers: list[np.ndarray], generation: Generation) -> Any:
        vectors = [part.view("<f4") for part in numbers]
        return embeddings_answer(light, vectors, _base(generation), generation.usage.prompt_tokens)

    return write


def write_embedding(numbers: list[np.ndarray], _: Generation) -> Any:
    """Return the answer of `/embed`."""
    return {"embeddings": numbers[0].view("<f4")}


def write_entities(request: EncoderRequest | EncoderBatchRequest) -> Write:
    """Return a function that writes the answer of `/classify` or `/classify_batch`."""

    def write(numbers: list[np.ndarray], generation: Generation) -> Any:
        texts = request.inputs if isinstance(request, EncoderBatchRequest) else [request.inputs]
        labels, prompts = _base(generation).labels, generation.call.prompts

        def rows() -> Iterator[list[dict[str, Any]]]:
            for text, prompt, part in zip(texts, prompts, numbers, strict=True):
                yield entities_of(text, prompt.offsets, part[::2], part[1::2].copy().view("<f4"), labels)

        return RowSlices(rows, at_once=VECTORS) if isinstance(request, EncoderBatchRequest) else next(rows())

    return write


def _base(generation: Generation) -> m.ServedModel:
    base = generation.call.base
    assert base is not None
    return base


def shortened(vector: np.ndarray, dimensions: int | None, *, unit_length: bool) -> np.ndarray:
    """Return the first entries of a vector (float32), normalized to length 1 if the model's vectors are."""
    if dimensions is None or dimensions == len(vector):
        return vector
    part = vector[:dimensions]
    length = float(np.linalg.norm(part))
    return part / np.float32(length) if unit_length and length else part


def embeddings_answer(
    request: EmbeddingsRequest, vectors: Sequence[np.ndarray], base: m.ServedModel, num_tokens: int
) -> dict[str, Any]:
    """Return OpenAI's answer; unless it is base64, also under the key of LoRAX, whose clients never request base64."""
    as_text = request.encoding_format == "base64"

    def rows() -> Iterator[dict[str, Any]]:
        for index, whole in enumerate(vectors):
            vector = shortened(whole, request.dimensions, unit_length=base.unit_length)
            shown = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector
            yield {"object": "embedding", "index": index, "embedding": shown}

    data = RowSlices(rows, at_once=VECTORS)
    answer = {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return answer if as_text else {**answer, "embeddings": data}


# ---------------------------------------------------------------- entities


@dataclass(slots=True)
class _Entity:
    tag: str
    start: int
    end: int
    scores: list[float]


def entities_of(
    text: str, offsets: Sequence[Offset], labels: np.ndarray, scores: np.ndarray, names: list[str]
) -> list[dict[str, Any]]:
    """Return the entities in labels (int [T]) with probabilities (float32 [T]), merged as in LoRAX.

    offsets: position of each of the T tokens in the text. An entity begins at a `B-` label and where the tag changes;
    its score is the mean of its tokens', its word is in lower case.
    """
    found: list[_Entity] = []
    current: _Entity | None = None
    for offset, label, score in zip(offsets, labels.tolist(), scores.tolist(), strict=True):
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
            "word": text[entity.start : entity.end].encode().lower().decode(),  # ASCII only, as in LoRAX
            "start": entity.start,
            "end": entity.end,
        }
        for entity in found
    ]


def _tag_of(label: str) -> tuple[bool, str]:
    """Return whether a label begins an entity, and its tag, "" for no entity."""
    if label == "O":
        return False, ""
    prefix, dash, tag = label.partition("-")
    return (prefix == "B", tag) if dash and prefix in ("B", "I") else (False, label)
