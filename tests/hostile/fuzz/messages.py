"""Messages on the queue: any bytes are decoded or refused with ProtocolError, and decoded messages are used.

Decoded messages are passed to their consumers: the scheduler's decisions, the gateway's cursor, the worker's requests.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
from hostile.fuzz import odd
from hostile.fuzz.engine import Target, pure
from hypothesis import strategies as st

from gateway.calls.replies import Cursor, newest_per_request
from gpu_worker.service.conversions import engine_request, owned_request
from protocol.queue.books.api_keys import ApiKey, Tenant
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.error_codec import error_from
from protocol.wire.errors import LorafleetError, ProtocolError
from protocol.wire.keys import CLASSES
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler

KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (*vars(m).values(), ApiKey, Tenant)
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct) and kind not in (m.Wire, m.Packed)
}
LISTS = {"Delta": list[m.Delta], "Assigned": list[m.Assigned], "Ended": list[m.Ended]}
"""Messages that are sent in lists."""

msgpack_leaves = st.one_of(odd.plain, st.binary(max_size=12), st.integers(-(1 << 63), (1 << 64) - 1))
msgpack_values = odd.nested(msgpack_leaves)


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a kind of message, and bytes: any msgpack, a valid message with odd fields, or a damaged one."""
    name = draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    how = draw(st.sampled_from(["any", "bytes", "fields", "fields", "damaged"]))
    if how == "any":
        return name, msgspec.msgpack.encode(draw(msgpack_values))
    if how == "bytes":
        return name, draw(st.binary(max_size=40))
    value = draw(GOOD[name])
    if how == "fields":
        places = list(range(len(value))) if isinstance(value, list) else list(kind.__struct_fields__)
        for _ in range(draw(st.integers(1, 2))):
            if places:
                value[draw(st.sampled_from(places))] = draw(msgpack_values)
    raw = msgspec.msgpack.encode([value] if name in LISTS else value)
    return name, draw(odd.damaged(st.just(raw))) if how == "damaged" else raw


_TEXT = st.one_of(st.sampled_from(["", "r", "w", "t", "interactive", "batch"]), odd.texts)
_WHOLE = st.one_of(st.integers(0, 300), st.sampled_from([0, -1, (1 << 31), (1 << 53)]))
_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: _TEXT, int: _WHOLE, float: st.one_of(st.floats(0, 2), st.sampled_from([-1.0, 1e300])), bool: st.booleans(),
    bytes: st.one_of(st.binary(max_size=16), st.just(b"\1\0\0\0\2\0\0\0")),
}  # fmt: skip


def _strategy_of(field: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Return a strategy for plain values of a field's type."""
    info = msgspec.inspect.type_info(field) if not isinstance(field, msgspec.inspect.Type) else field
    inspect_ = msgspec.inspect
    match info:
        case inspect_.StrType():
            return _PLAIN[str]
        case inspect_.IntType():
            return _PLAIN[int]
        case inspect_.FloatType():
            return _PLAIN[float]
        case inspect_.BoolType():
            return _PLAIN[bool]
        case inspect_.BytesType():
            return _PLAIN[bytes]
        case inspect_.NoneType():
            return st.none()
        case inspect_.LiteralType():
            return st.sampled_from(info.values)
        case inspect_.UnionType():
            return st.one_of([_strategy_of(inner, depth) for inner in info.types])
        case inspect_.ListType() | inspect_.VarTupleType():
            return st.lists(_strategy_of(info.item_type, depth + 1), max_size=3)
        case inspect_.TupleType():
            return st.tuples(*(_strategy_of(inner, depth + 1) for inner in info.item_types)).map(list)
        case inspect_.DictType():
            keys, values = _strategy_of(info.key_type, depth + 1), _strategy_of(info.value_type, depth + 1)
            return st.dictionaries(keys, values, max_size=3)
        case inspect_.StructType():
            fields = {field.encode_name: _strategy_of(field.type, depth + 1) for field in info.fields}
            if info.array_like:
                return st.tuples(*fields.values()).map(list)
            return st.fixed_dictionaries(fields)
        case _:
            return odd.values


GOOD = {name: _strategy_of(kind) for name, kind in KINDS.items()}


def can_be_read(name: str, raw: bytes) -> bool:
    """Return whether bytes are a valid message of a kind."""
    try:
        decode(raw, LISTS.get(name, KINDS[name]))
    except ProtocolError:
        return False
    return True


def _check(case: tuple[str, bytes]) -> str:
    name, raw = case
    try:
        message = decode(raw, LISTS.get(name, KINDS[name]))
    except ProtocolError:
        return f"{name} refused"
    _use(name, message)
    return f"{name} read"


def _use(name: str, message: Any) -> None:
    """Pass a message to the code that consumes its kind. Raises what would end that code."""
    match name:
        case "RequestHead" if message.cls in CLASSES:  # the code that reads it refuses others
            scheduler = _scheduler()
            scheduler.submit(message, 0)
            scheduler.plan(1.0)
            scheduler.tick()
            scheduler.expired(1 << 60)
        case "Ended":
            scheduler = _scheduler()
            scheduler.submit(SUBMIT, 0)
            scheduler.plan(1.0)
            for ended in message:
                scheduler.ended(ended)
        case "WorkerBeat":
            scheduler = _scheduler()
            scheduler.submit(SUBMIT, 0)
            scheduler.beats({"w": message}, 0.5)
            scheduler.plan(1.0)
            scheduler.tick()
        case "Delta":
            cursor = Cursor()
            for delta in newest_per_request(message):
                if not cursor.needs_log(delta):
                    cursor.take(delta, 4)
        case "Body":
            for item in (m.Assigned("r", 1, ""),):
                owned_request(item, b"1-1", message, b"", b"")
                try:
                    engine_request(item, message, b"")
                except ProtocolError:
                    return
        case "ErrorInfo":
            assert isinstance(error_from(msgspec.json.encode(message).decode()), LorafleetError)
        case _:
            pass


SUBMIT = m.RequestHead(
    rid="r", tenant="t", cls="interactive", digest="", num_prompt_tokens=3, max_new_tokens=8, deadline_ms=1 << 50,
    gateway="g",
)  # fmt: skip


def _scheduler() -> Scheduler:
    scheduler = Scheduler(SchedulerConfig())
    scheduler.beats({"w": m.WorkerBeat(wid="w", name="w", capacity=4, kv_blocks_free=9, kv_blocks_total=9)}, 0.5)
    return scheduler


TARGETS = (Target("messages of the queue", messages(), pure(_check)),)
