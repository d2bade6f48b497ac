"""Calls of an encoder base: texts become requests in the queue, one each, and their numbers an answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import orjson
from starlette.responses import Response

from gateway.adapters.resolver import Target
from gateway.auth.callers import Caller
from gateway.calls.calls import Calls, Work, pack, requests_of, rid_of
from gateway.calls.choices import Choice, Piece, Prompt
from gateway.calls.generation import Generation, Terms
from gateway.calls.writers import Usage
from gateway.encoders.api import (
    EmbeddingsRequest,
    EncoderBatchRequest,
    EncoderRequest,
    Spans,
    check_dimensions,
    check_length,
    check_native_length,
    check_task,
    embeddings_answer,
    entities_of,
)
from gateway.http.errors import OPENAI_ERRORS, ErrorShape
from gateway.http.sse import GenerationResponse
from gateway.lorax.adapters import NativeAdapters
from gateway.lorax.answer import compute_type, times_of
from gateway.lorax.api import AdapterParameters
from gateway.lorax.errors import LORAX_GENERATION_ERRORS
from gateway.openai.api import Options
from gateway.overload.admission import Load
from protocol.queue.bus import now_ms
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest
from protocol.wire.keys import INTERACTIVE

_OPTIONS = Options(
    sampling=m.Sampling(), n=1, max_tokens=0, default_tokens=0, stop=[], stop_token_ids=[], stream=False,
    include_usage=False, echo=False, background=False, cls=INTERACTIVE, lora_scale=1.0,
)  # fmt: skip
CLASSIFY_HEADERS = ("x-compute-time", "x-validation-time", "x-queue-time", "x-inference-time")


class EncoderChoice(Choice):
    """One text's request; its log holds numbers, see `messages.Body.task`."""

    def absorb(self, ids: bytes, records: bytes, piece: Piece) -> None:
        """Keep what comes out of the text: `shown` has it."""

    @property
    def num_output_tokens(self) -> int:
        return 0

    @property
    def numbers(self) -> np.ndarray:
        """All of the log, as int32."""
        return np.frombuffer(self.shown[0], "<i4")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a call wants computed."""

    task: m.Task
    target: Target
    texts: list[list[int]]  # token ids
    caller: Caller


class EncoderResponse(GenerationResponse):
    """The answer to a call, when all its texts are computed."""

    def __init__(
        self,
        generation: Generation,
        write: Callable[[list[np.ndarray], Usage], Any],
        *,
        errors: ErrorShape = OPENAI_ERRORS,
        keepalive_s: float,
    ) -> None:
        """write: from the numbers of each text (int32) to what the answer is as JSON."""
        super().__init__(generation, _Silent(), stream=False, include_usage=False, keepalive_s=keepalive_s)
        self._write = write
        self.errors = errors
        self.timing: Callable[[], Any] | None = None  # what the headers of the answer are, to be awaited

    async def whole(self, choices: list[Piece]) -> Response:
        numbers = [choice.numbers for choice in self.generation.choices if isinstance(choice, EncoderChoice)]
        body = orjson.dumps(self._write(numbers, self.generation.usage), option=orjson.OPT_SERIALIZE_NUMPY)
        headers = await self.timing() if self.timing is not None else None
        return Response(body, 200, headers, "application/json")


class _Silent:
    """A writer for answers that are not written piece by piece."""

    def frames(self, piece: Piece) -> bytes:
        return b""

    def usage_frame(self, usage: Usage) -> bytes:
        return b""

    def show_usage(self, usage: Usage) -> None: ...

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        return {}


class EncoderCalls:
    """Makes requests of calls."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._adapters = NativeAdapters(calls.resolver, calls.settings)

    # ------------------------------------------------------------ the routes' answers

    async def embeddings(self, request: EmbeddingsRequest, caller: Caller) -> EncoderResponse:
        """Answer `/v1/embeddings`. Raises what the client did wrong, Overloaded and Unavailable."""
        base = await self._require("embed")
        check_dimensions(request.dimensions, base)
        sources = request.sources
        self._check_number(len(sources), "input")
        if request.parameters is not None:
            target = await self._resolve(request.parameters, base, caller)
        else:
            timeout_s = self._calls.settings.request_timeout_s
            target = await self._calls.resolver.resolve(request.model, base, timeout_s, caller)
        texts = await self._tokens(sources, target, base)
        generation = await self._submit(Inputs("embed", target, texts, caller))

        def write(numbers: list[np.ndarray], usage: Usage) -> dict[str, Any]:
            vectors = [part.view("<f4") for part in numbers]
            return embeddings_answer(request, vectors, base, usage.prompt_tokens)

        return EncoderResponse(generation, write, keepalive_s=self._calls.settings.keepalive_s)

    async def embed(self, request: EncoderRequest, caller: Caller) -> EncoderResponse:
        """Answer `/embed`. Raises as `embeddings`, and GenerationFailed."""
        base = await self._require("embed")
        target = await self._resolve(request.parameters, base, caller)
        [ids] = await target.files.encode([request.inputs])
        check_native_length(len(ids) if request.inputs else 0, base)
        generation = await self._submit(Inputs("embed", target, [ids], caller))
        return EncoderResponse(
            generation,
            lambda numbers, usage: {"embeddings": numbers[0].view("<f4")},
            errors=LORAX_GENERATION_ERRORS,
            keepalive_s=self._calls.settings.keepalive_s,
        )

    async def classify(
        self, request: EncoderRequest | EncoderBatchRequest, caller: Caller, started_s: float
    ) -> EncoderResponse:
        """Answer `/classify` and `/classify_batch`. started_s: monotonic, of its arrival. Raises as `embed`."""
        base = await self._require("classify")
        is_batch = isinstance(request, EncoderBatchRequest)
        inputs = request.inputs if isinstance(request, EncoderBatchRequest) else [request.inputs]
        self._check_number(len(inputs), "inputs")
        target = await self._resolve(request.parameters, base, caller)
        encodings = await asyncio.to_thread(target.files.tokenizer.encode_batch, inputs)
        for text, encoding in zip(inputs, encodings, strict=True):
            check_native_length(len(encoding.ids) if text else 0, base)
        spans = [
            Spans(text, [None if special else (start, end) for (start, end), special
                         in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)])
            for text, encoding in zip(inputs, encodings, strict=True)
        ]  # fmt: skip
        generation = await self._submit(Inputs("classify", target, [e.ids for e in encodings], caller))

        def write(numbers: list[np.ndarray], usage: Usage) -> Any:
            found = [
                entities_of(span, part[::2], part[1::2].copy().view("<f4"), base.labels)
                for span, part in zip(spans, numbers, strict=True)
            ]
            return found if is_batch else found[0]

        response = EncoderResponse(
            generation, write, errors=LORAX_GENERATION_ERRORS, keepalive_s=self._calls.settings.keepalive_s
        )
        submitted_s = time.monotonic()

        async def timing() -> dict[str, str]:
            times = await times_of(generation, started_s, submitted_s)
            return {"x-compute-type": compute_type(base), **{name: times[name] for name in CLASSIFY_HEADERS}}

        response.timing = timing
        return response

    # ------------------------------------------------------------ parts

    async def _require(self, task: m.Task) -> m.ServedModel:
        base = await self._calls.fleet.require(worker=True)
        check_task(base, task)
        self._calls.admission.check(Load(INTERACTIVE))
        return base

    def _check_number(self, num: int, param: str) -> None:
        limit = self._calls.settings.max_inputs
        if not num:
            raise BadRequest(f"{param} is an empty list", param=param)
        if num > limit:
            raise BadRequest(f"{param} has {num} texts; the limit is {limit}", param=param)

    async def _resolve(self, given: AdapterParameters | None, base: m.ServedModel, caller: Caller) -> Target:
        """Return what LoRAX's `parameters` name."""
        return await self._adapters.resolve(given or AdapterParameters(), base, caller)

    async def _tokens(self, sources: Sequence[str | list[int]], target: Target, base: m.ServedModel) -> list[list[int]]:
        """Return the tokens of texts, with the special ones; token ids are taken as they are. Raises BadRequest."""
        texts = [source for source in sources if isinstance(source, str)]
        encoded = iter(await target.files.encode(texts) if texts else [])
        vocab_size = target.vocab_size or base.vocab_size
        found: list[list[int]] = []
        for source in sources:
            ids = next(encoded) if isinstance(source, str) else source
            check_length(len(ids) if source else 0, base)
            if not isinstance(source, str) and not (min(ids) >= 0 and max(ids) < vocab_size):
                raise BadRequest(f"input: token ids must be from 0 to {vocab_size - 1}", param="input")
            found.append(ids)
        return found

    async def _submit(self, inputs: Inputs) -> Generation:
        calls = self._calls
        call = uuid.uuid4().hex
        deadline_ms = now_ms() + int(calls.settings.request_timeout_s * 1000)
        files = inputs.target.files
        prompts = [Prompt(pack(ids), len(ids), "", files) for ids in inputs.texts]
        work = Work(inputs.caller, _OPTIONS, [inputs.target], prompts, [0] * len(prompts))
        choices = [EncoderChoice(i, rid_of(call, i), prompt, _OPTIONS) for i, prompt in enumerate(prompts)]
        generation = Generation(
            calls.replies, choices, Terms(deadline_ms=deadline_ms, eager=False, adapter=any(work.digests))
        )
        made = requests_of(work, call, deadline_ms, calls.files.eos_ids, gateway=calls.replies.gid, stored=False)
        requests = [(submit, msgspec.structs.replace(body, task=inputs.task)) for submit, body in made]
        await calls.begin(generation, work, requests)
        return generation
