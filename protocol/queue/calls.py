"""What the requests of one call share in the queue: their bodies, each stored once.

`Keys.body` is a hash. Its numbered fields hold the bodies, one for each prompt of each answering model; the field
`common` holds what all bodies have in common. `Keys.call` counts the requests that have not ended (`common.lua`), and
the last of them deletes the bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from protocol.queue import signatures as lua
from protocol.runtime.sealing import Seal
from protocol.wire import messages as m
from protocol.wire.codec import MALFORMED, decode
from protocol.wire.errors import ProtocolError

COMMON = "common"

_FIELDS = m.Body.__struct_fields__
_VECTOR_BYTES = 16_384  # bytes of an embedding with 4,096 entries


def packed_bodies(bodies: Sequence[m.Body]) -> tuple[list[int], dict[str, bytes]]:
    """Return the number of each request's body, and the fields of the hash. The same object is stored once."""
    if len(bodies) == 1:
        return [0], {"0": m.encode(bodies[0])}
    parts: dict[int, m.Body] = {id(body): body for body in bodies}
    numbers = {key: number for number, key in enumerate(parts)}
    distinct = list(parts.values())
    which = [numbers[id(body)] for body in bodies]
    if len(distinct) == 1:
        return which, {"0": m.encode(distinct[0])}
    first, *others = distinct
    common = [name for name in _FIELDS if all(_same(getattr(first, name), getattr(o, name)) for o in others)]
    own = [name for name in _FIELDS if name not in common]
    fields = {str(i): m.encode({name: getattr(body, name) for name in own}) for i, body in enumerate(distinct)}
    return which, {COMMON: m.encode({name: getattr(first, name) for name in common}), **fields}


def sealed_bodies(fields: dict[str, bytes], key: str, seal: Seal) -> dict[str, bytes]:
    """Return the fields of the hash `key`, each encrypted and bound to its place in the hash."""
    return {name: seal.seal(text, f"{key}/{name}") for name, text in fields.items()}


def submit_rows(heads: Sequence[m.RequestHead], parts: Sequence[int], usages: Sequence[bytes]) -> list[lua.SubmitRow]:
    """Return the script rows of a call's requests; the call has the id of the first.

    parts: number of each request's body. usages: what each request's end adds to its tenant's usage; (): nothing.
    """
    call = heads[0].rid
    rows: list[lua.SubmitRow] = []
    for head, part, usage in zip(heads, parts, usages or [b""] * len(heads), strict=True):
        sub = head if head.rid == call else msgspec.structs.replace(head, call=call, part=part)
        rows.append(lua.SubmitRow(
            rid=sub.rid, sub=m.encode(sub), tenant=sub.tenant, digest=sub.digest, gateway=sub.gateway,
            is_stored=int(sub.stored), num_prompt=sub.num_prompt_tokens, num_virtual=sub.num_virtual,
            max_new=sub.max_new_tokens, deadline_ms=sub.deadline_ms, usage=usage,
        ))  # fmt: skip
    return rows


class Input(NamedTuple):
    """What a worker reads about a request, as stored."""

    common: bytes | None  # `common` and `part` are fields of the bodies' hash
    part: bytes | None  # None: it has expired
    log: bytes  # int32 ids
    logprobs: bytes  # logprob records of the log
    key: str = ""
    number: int = 0  # name of the field `part` in the hash
    seal: Seal | None = None

    def body(self) -> m.Body | None:
        """Return the request's body; None if it has expired. Raises ProtocolError."""
        common, part = self.common, self.part
        if part is None:
            return None
        if self.seal is not None:
            part = self.seal.open(part, f"{self.key}/{self.number}")
            common = common and self.seal.open(common, f"{self.key}/{COMMON}")
        if common is None:
            return decode(part, m.Body)
        try:
            fields = decode(common, dict[str, Any]) | decode(part, dict[str, Any])
            return msgspec.convert(fields, m.Body)
        except MALFORMED as error:
            raise ProtocolError(f"cannot decode {m.Body}: {error}") from error


def most_log_bytes(body: m.Body) -> int:
    """Return the maximum bytes of a request's logs: tokens and logprobs, or the numbers that an encoder returns."""
    num_prompt, sampling = len(body.prompt) // 4, body.sampling
    if body.task == "embed":
        return _VECTOR_BYTES
    if body.task == "classify":
        return 8 * num_prompt
    if body.task == "score":
        return 4 * m.MAX_LABELS
    num_top, num_of_prompt = sampling.num_logprobs, sampling.prompt_logprobs
    token_bytes = 4 if num_top is None else 4 + m.logprob_record_bytes(num_top, sampling.vocabulary)
    prompt_bytes = 0 if num_of_prompt is None else 4 + m.prompt_record_bytes(num_of_prompt, sampling.vocabulary)
    return token_bytes * body.max_new_tokens + prompt_bytes * num_prompt


def _same(a: object, b: object) -> bool:
    return a is b or a == b
