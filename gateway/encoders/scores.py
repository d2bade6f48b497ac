"""*Write* for labels and scores of whole texts, made from logits or from the vectors of a pair's texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gateway.bodies.json_slices import RowSlices
from gateway.calls.follow import Generation
from gateway.encoders.encoder_bodies import (
    ClassifyRequest,
    EncoderBatchRequest,
    EncoderRequest,
    RerankRequest,
    ScoreRequest,
)
from gateway.encoders.encoder_write import VECTORS, Write
from protocol.runtime.imports import Late
from protocol.wire import messages as m

if TYPE_CHECKING:
    import numpy as np
else:
    np = Late("numpy")


def activated(logits: np.ndarray, activation: m.Activation) -> np.ndarray:
    """Apply an activation to logits, float32 [N]; see `messages.Activation`."""
    if activation == "none":
        return logits
    if activation == "sigmoid" or len(logits) == 1:  # the softmax of a single logit is always 1
        return (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def label_names(base: m.ServedModel, num: int) -> Sequence[str]:
    """Return the names of labels: the base's if their number matches, else transformers' default names."""
    return base.labels if len(base.labels) == num else [f"LABEL_{i}" for i in range(num)]


def write_labels(request: ClassifyRequest) -> Write:
    """Return a function that writes the answer of `/v1/classify`."""
    raw, name = request.use_activation is False, request.model

    def write(numbers: list[np.ndarray], generation: Generation) -> Any:
        base = _base(generation)
        activation: m.Activation = "none" if raw else base.activation

        def rows() -> Iterator[dict[str, Any]]:
            for index, part in enumerate(numbers):
                probs = activated(part.view("<f4"), activation)
                label = label_names(base, len(probs))[int(probs.argmax())]
                yield {"index": index, "label": label, "probs": probs, "num_classes": len(probs)}

        more = {"completion_tokens": 0, "prompt_tokens_details": None}
        return {
            **_head(generation, "classify-"),
            "model": name,
            "data": RowSlices(rows, at_once=VECTORS),
            "usage": _usage(generation) | more,
        }

    return write


def write_text_labels(request: EncoderRequest | EncoderBatchRequest) -> Write:
    """Return a function that writes texts' labels on LoRAX's routes, likeliest first, as transformers' pipeline."""
    is_batch = isinstance(request, EncoderBatchRequest)

    def write(numbers: list[np.ndarray], generation: Generation) -> Any:
        base = _base(generation)

        def rows() -> Iterator[list[dict[str, Any]]]:
            for part in numbers:
                probs = activated(part.view("<f4"), base.activation)
                names = label_names(base, len(probs))
                yield [{"label": names[i], "score": float(probs[i])} for i in np.argsort(-probs, kind="stable")]

        return RowSlices(rows, at_once=VECTORS) if is_batch else next(rows())

    return write


def write_scores(request: ScoreRequest, num_firsts: int) -> Write:
    """Return a function that writes the answer of `/v1/score`. num_firsts: as for `pair_scores`."""
    raw, name = request.use_activation is False, request.model

    def write(numbers: list[np.ndarray], generation: Generation) -> Any:
        scores = pair_scores(numbers, generation, num_firsts, raw=raw)

        def rows() -> Iterator[dict[str, Any]]:
            for index, score in enumerate(scores):
                yield {"index": index, "object": "score", "score": score}

        return {**_head(generation, "score-"), "model": name, "data": RowSlices(rows), "usage": _usage(generation)}

    return write


def write_ranks(request: RerankRequest, documents: Sequence[str]) -> Write:
    """Return a function that writes the answer of `/v1/rerank`. documents: their texts."""
    raw, name, most = request.use_activation is False, request.model, request.top_n or len(documents)
    shown = documents if request.return_documents is not False else None

    def write(numbers: list[np.ndarray], generation: Generation) -> Any:
        scores = pair_scores(numbers, generation, 1, raw=raw)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:most]

        def rows() -> Iterator[dict[str, Any]]:
            for index in order:
                document = {} if shown is None else {"document": {"text": shown[index]}}
                yield {"index": index, **document, "relevance_score": scores[index]}

        return {
            "id": f"rerank-{generation.call.id}",
            "model": name,
            "usage": _usage(generation),
            "results": RowSlices(rows, at_once=VECTORS),
        }

    return write


def pair_scores(numbers: list[np.ndarray], generation: Generation, num_firsts: int, *, raw: bool) -> list[float]:
    """Return the score of each pair: its only logit, or the cosine of its texts' vectors.

    num_firsts: number of first texts, one for all pairs or one per pair. raw: return the logit without activation.
    """
    parsed = generation.call.parsed
    if parsed.task == "score":
        activation: m.Activation = "none" if raw else _base(generation).pair_activation
        return [float(activated(part.view("<f4"), activation)[0]) for part in numbers]
    vectors = [part.view("<f4").astype(np.float64) for part in numbers]
    lengths = [float(np.linalg.norm(vector)) for vector in vectors]
    firsts = range(num_firsts) if num_firsts > 1 else [0] * (len(vectors) - 1)
    return [
        float(vectors[i] @ vectors[j]) / (lengths[i] * lengths[j] or 1.0)
        for i, j in zip(firsts, range(num_firsts, len(vectors)), strict=True)
    ]


def _head(generation: Generation, prefix: str) -> dict[str, Any]:
    call = generation.call
    return {"id": prefix + call.id, "object": "list", "created": call.created_ms // 1000}


def _usage(generation: Generation) -> dict[str, Any]:
    num = generation.usage.prompt_tokens
    return {"prompt_tokens": num, "total_tokens": num}


def _base(generation: Generation) -> m.ServedModel:
    base = generation.call.base
    assert base is not None
    return base
