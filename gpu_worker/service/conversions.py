"""Converts the queue's messages to the types of engine and outbox. Pure."""

from __future__ import annotations

import numpy as np

from gpu_worker.planning.request import EngineRequest
from gpu_worker.service.owned import OwnedRequest
from protocol.queue.bus import Entry, decode
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, ProtocolError


def assignments_in(entry: Entry) -> list[m.Assigned]:
    """Return the requests that an entry of a work stream assigns. Raises ProtocolError."""
    raw = entry[1].get(b"b", b"")
    return decode(raw, list[m.Assigned]) if raw else []


def owned_request(item: m.Assigned, entry: bytes, body: m.Body | None, log: bytes, logprobs: bytes) -> OwnedRequest:
    """Return an assigned request in the outbox's form.

    entry: id of the work entry. body: None if it has expired or cannot be read. log, logprobs: int32 ids and records
    written so far.
    """
    if body is None:
        body, logprobs = m.Body(prompt=b"", sampling=m.Sampling(), max_new_tokens=0), b""
    num_top = body.sampling.num_logprobs
    record_bytes = 0 if num_top is None else m.logprob_record_bytes(num_top, body.sampling.vocabulary)
    return OwnedRequest(
        item.rid, item.epoch, entry, item.gateway, item.tenant, len(body.prompt) // 4, record_bytes,
        bytearray(log), bytearray(logprobs), body.task,
        scored_prompt=body.prompt if body.sampling.prompt_logprobs is not None else b"",
        queued_ms=item.queued_ms, trace=item.trace,
    )  # fmt: skip


def engine_request(item: m.Assigned, body: m.Body, log: bytes) -> EngineRequest:
    """Return an assigned request in the engine's form. log: the int32 ids written so far.

    Raises ProtocolError for a prompt that is not int32.
    """
    if len(body.prompt) % 4:
        raise ProtocolError(f"the prompt of {item.rid} has {len(body.prompt)} bytes, which are not int32 ids")
    return EngineRequest(
        rid=item.rid,
        epoch=item.epoch,
        digest=item.digest,
        prompt=np.frombuffer(body.prompt, "<i4"),
        output=np.frombuffer(log, "<i4").tolist(),
        sampling=body.sampling.of_choice(item.choice),
        max_new_tokens=body.max_new_tokens,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        salt=body.salt,
        lora_scale=body.lora_scale,
        tenant=item.tenant,
        yields=item.yields,
        alone=item.alone,
        batch=item.batch,
        grammar=body.grammar,
        task=body.task,
        second=body.second,
    )


def failure_reason(error: Exception) -> str:
    """Return the reason why a worker cannot start, as one line."""
    text = error.message if isinstance(error, LorafleetError) else f"{type(error).__name__}: {error}"
    return text.strip().partition("\n")[0]
