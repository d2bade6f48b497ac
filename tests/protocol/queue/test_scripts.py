"""Every Lua script on a real server: its effects, its refusals, and that a repeated call changes nothing."""

from __future__ import annotations

import msgspec
import pytest
from helpers.script_queue import DEADLINE_MS, GATEWAY, Queue, ids, make_body, make_submit, row

from protocol.queue.bus import Refused, StepResult, decode, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import WorkerLost


async def test_submit_queues_a_group_with_its_facts_and_life_times(queue: Queue) -> None:
    assert await queue.submit("a", "b") == ("ok", None)
    assert await queue.queued() == [("a", 0), ("b", 0)]
    fields = await queue.fields("a")
    assert {k: fields[k] for k in ("state", "epoch", "attempts", "owner", "cancel", "gateway", "tenant")} == {
        "state": "queued", "epoch": "0", "attempts": "0", "owner": "", "cancel": "0", "gateway": GATEWAY, "tenant": "t",
    }  # fmt: skip
    assert [read.body() for read in await queue.bus.inputs(await queue.submitted())] == [make_body()] * 2
    for key in (queue.keys.req("a"), queue.keys.call("a"), queue.keys.body("a")):
        assert 3600 < await queue.ttl_s(key) <= 3600 + DEADLINE_MS / 1000


async def test_submit_takes_all_or_none(queue: Queue) -> None:
    await queue.submit("a", "b")
    assert await queue.submit("c", "d", max_queued=3) == ("full", 2)
    assert await queue.queued() == [("a", 0), ("b", 0)]
    assert not await queue.bus._redis.exists(queue.keys.req("c"), queue.keys.call("c"))


async def test_a_repeated_submit_neither_queues_twice_nor_resets(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.submit("a", max_queued=0) == ("ok", None)
    assert await queue.queued() == []
    assert (await queue.fields("a"))["epoch"] == "1"


async def test_an_idempotency_key_returns_what_it_was_first_used_for(queue: Queue) -> None:
    key = queue.keys.idem("t", "k")

    async def submit(rid: str, value: bytes) -> tuple[str, object]:
        pairs = [(make_submit(rid), make_body())]
        return await queue.bus.submit("interactive", pairs, max_queued=9, idem_key=key, idem_value=value)

    assert await submit("a", b"first") == ("ok", None)
    assert await submit("a", b"first") == ("ok", None)  # the same call again
    assert await submit("b", b"second") == ("idem", b"first")
    assert await queue.queued() == [("a", 0)]
    assert 86_000 < await queue.ttl_s(key) <= 86_400


async def test_an_idempotency_key_is_not_used_up_by_a_refusal(queue: Queue) -> None:
    pairs, key = [(make_submit("a"), make_body())], queue.keys.idem("t", "k")
    assert (await queue.bus.submit("interactive", pairs, max_queued=0, idem_key=key, idem_value=b"v"))[0] == "full"
    assert not await queue.bus._redis.exists(key)


# ---------------------------------------------------------------- assign


async def test_assign_moves_a_batch_to_a_worker(queue: Queue) -> None:
    await queue.submit("a", "b")
    assert await queue.assign("a", "b") == ("ok", [])
    assert await queue.queued() == []
    fields = await queue.fields("a")
    assert (fields["state"], fields["owner"], fields["epoch"], fields["start"]) == ("assigned", "w", "1", "0")
    assert [item.rid for item in await queue.bus.work_of("w")] == ["a", "b"]


async def test_assign_takes_none_when_one_is_not_as_believed(queue: Queue) -> None:
    await queue.submit("a", "b", "c")
    await queue.bus.cancel("b")
    assert await queue.assign("a", "b", "unknown") == ("stale", ["b", "unknown"])
    assert await queue.assign("a", epoch=4) == ("stale", ["a"])
    assert await queue.work() == []
    assert (await queue.fields("a"))["state"] == "queued"


async def test_a_repeated_assign_is_told_ok_and_does_nothing(queue: Queue) -> None:
    await queue.submit("a", "b")
    assert await queue.assign("a", "b") == ("ok", [])
    assert await queue.assign("a", "b") == ("ok", [])
    assert len(await queue.work()) == 1
    assert (await queue.fields("a"))["epoch"] == "1"
    await queue.bus.streams.create(queue.keys.work("w2"), 300)
    assert await queue.assign("a", "b", wid="w2") == ("stale", ["a", "b"])


async def test_assign_to_a_worker_without_a_stream_does_not_make_one(queue: Queue) -> None:
    await queue.submit("a")
    assert await queue.assign("a", wid="gone") == ("gone", [])
    assert not await queue.bus._redis.exists(queue.keys.work("gone"))
    assert (await queue.fields("a"))["state"] == "queued"
    assert await queue.queued() == [("a", 0)]


async def test_only_the_leader_assigns(queue: Queue) -> None:
    await queue.submit("a")
    token = await queue.bus.lead("", "me", 3000)
    assert await queue.assign("a", leader="other:1") == ("deposed", [])
    assert await queue.assign("a", leader=token) == ("ok", [])


# ---------------------------------------------------------------- step


async def test_step_makes_tokens_and_ends_durable_and_visible_together(queue: Queue) -> None:
    await queue.running("a", "b")
    (entry,) = await queue.work()
    step = StepResult(
        rows=[row("a", 0, 5, 6), row("b", 0, 7, finish="length", logprobs=b"\0" * 4)],
        outs={GATEWAY: [m.Delta("a", 1, 0, ids(5, 6)), m.Delta("b", 1, 0, ids(7), finish="length")]},
        ended=[m.Ended("b", "w", 1, 1)],
    )
    assert await queue.bus.step("w", step) == []
    assert await queue.log("a") == ids(5, 6)
    assert await queue.log("b") == ids(7)
    assert await queue.bus._redis.get(queue.keys.lp("b")) == b"\0" * 4
    assert [delta.rid for delta in await queue.deltas()] == ["a", "b"]
    assert await queue.ended() == [m.Ended("b", "w", 1, 1)]
    assert (await queue.fields("a"))["state"] == "assigned"
    fields = await queue.fields("b")
    assert (fields["state"], fields["finish"], fields["owner"]) == ("completed", "length", "")
    assert await queue.work() == [entry]
    last = StepResult(rows=[row("a", 2, finish="stop")], done_entries=[entry])
    assert await queue.bus.step("w", last) == []
    assert await queue.work() == []


async def test_step_gives_keys_their_life_times(queue: Queue) -> None:
    await queue.submit("a")
    await queue.submit("kept", stored=True)
    await queue.assign("a", "kept")
    await queue.bus.step("w", StepResult(rows=[row("a", 0, 1, logprobs=b"1234"), row("kept", 0, 1)]))
    for kind in (queue.keys.tok, queue.keys.lp):
        assert 3600 < await queue.ttl_s(kind("a")) <= 3600 + DEADLINE_MS / 1000
    await queue.bus.step("w", StepResult(rows=[row("a", 1, 2, finish="stop"), row("kept", 1, 2, finish="stop")]))
    for kind in (queue.keys.req, queue.keys.tok, queue.keys.lp):
        assert 0 < await queue.ttl_s(kind("a")) <= 120
    assert 86_000 < await queue.ttl_s(queue.keys.tok("kept")) <= 86_400
    await queue.submit("vector", max_new_tokens=0)
    await queue.assign("vector")
    await queue.bus.step("w", StepResult(rows=[row("vector", 0, 1, 2, finish="stop")]))
    assert 0 < await queue.ttl_s(queue.keys.tok("vector")) <= 60


async def test_one_bad_row_stops_the_whole_step_and_every_reason_has_a_code(queue: Queue) -> None:
    await queue.running("ok", "ended", "moved", "stopped", "short")
    await queue.bus.finish("ended", "failed", "error")
    await queue.requeue("moved")
    await queue.bus.cancel("stopped")
    await queue.bus.step("w", StepResult(rows=[row("short", 0, 1, 2)]))
    before = await queue.deltas()
    step = StepResult(
        rows=[row("ok", 0, 1), row("never", 0, 1), row("ended", 0, 1), row("moved", 0, 1), row("stopped", 0, 1),
              row("short", 5, 1)],
        outs={GATEWAY: [m.Delta("ok", 1, 0, ids(1))]},
        ended=[m.Ended("ok", "w", 1, 1)],
        done_entries=await queue.work(),
    )  # fmt: skip
    assert await queue.bus.step("w", step) == [
        Refused("never", "missing", 0, 0), Refused("ended", "terminal", 2, 0), Refused("moved", "stale", 2, 0),
        Refused("stopped", "cancelled", 1, 0), Refused("short", "length", 1, 2),
    ]  # fmt: skip
    assert await queue.log("ok") == b""
    assert await queue.deltas() == before
    assert [item for item in await queue.ended() if item.rid == "ok"] == []
    assert len(await queue.work()) == 1


async def test_a_repeated_step_is_refused_with_the_length_it_wrote(queue: Queue) -> None:
    await queue.running("a", "b")
    step = StepResult(rows=[row("a", 0, 1, 2), row("b", 0, 3, finish="length")])
    assert await queue.bus.step("w", step) == []
    assert await queue.bus.step("w", step) == [Refused("a", "length", 1, 2), Refused("b", "terminal", 1, 1)]
    assert await queue.log("a") == ids(1, 2)


async def test_a_cancelled_request_may_still_write_its_end(queue: Queue) -> None:
    await queue.running("a")
    await queue.bus.cancel("a")
    assert await queue.bus.step("w", StepResult(rows=[row("a", 0, 4, finish="cancelled")])) == []
    assert (await queue.fields("a"))["state"] == "cancelled"
    assert await queue.log("a") == ids(4)


async def test_a_step_for_a_dead_gateway_does_not_bring_its_stream_back(queue: Queue) -> None:
    await queue.running("a")
    step = StepResult(rows=[row("a", 0, 1)], outs={"dead": [m.Delta("a", 1, 0, ids(1))]})
    assert await queue.bus.step("w", step) == []
    assert not await queue.bus._redis.exists(queue.keys.out("dead"))


# ---------------------------------------------------------------- cancel and finish


async def test_cancel_ends_a_queued_request_and_tells_gateway_and_scheduler(queue: Queue) -> None:
    await queue.submit("a")
    assert await queue.bus.cancel("a") == "cancelled"
    assert await queue.bus.cancel("a") == "cancelled"
    assert await queue.queued() == []
    assert [(delta.rid, delta.seq0, delta.finish) for delta in await queue.deltas()] == [("a", -1, "cancelled")]
    assert [(item.rid, item.wid) for item in await queue.ended()] == [("a", "")]
    assert 0 < await queue.ttl_s(queue.keys.req("a")) <= 120


async def test_cancel_asks_the_worker_of_a_running_request(queue: Queue) -> None:
    await queue.running("a")
    for _ in range(2):  # a repeated cancel adds nothing
        assert await queue.bus.cancel("a") == "assigned"
        assert await queue.orders() == [m.Control(kind="cancel", rid="a")]
    assert await queue.deltas() == []
    assert await queue.bus.cancel("unknown") == ""


async def test_cancel_after_the_end_changes_nothing(queue: Queue) -> None:
    await queue.running("a")
    await queue.bus.step("w", StepResult(rows=[row("a", 0, 1, finish="stop")]))
    assert await queue.bus.cancel("a") == "completed"
    assert await queue.orders() == []


async def test_finish_ends_once_fences_the_owner_and_leaves_a_dead_letter(queue: Queue) -> None:
    await queue.running("a")
    letter = m.DeadLetter(reason="poison", deaths=[m.Death("w", "worker-0", 5, 4, 3, 2)])
    error = WorkerLost("gone")
    assert await queue.bus.finish("a", "failed", "error", error, dead_letter=letter)
    assert not await queue.bus.finish("a", "failed", "error", error, dead_letter=letter)
    (delta,) = await queue.deltas()
    assert (delta.rid, delta.finish, delta.seq0) == ("a", "error", -1)
    assert msgspec.json.decode(delta.error, type=m.ErrorInfo).code == "worker_lost"
    ((_, fields),) = await queue.bus.streams.entries(queue.keys.dlq)
    assert decode(fields[b"b"], m.DeadLetter) == letter
    assert 604_000 < await queue.ttl_s(queue.keys.dlq) <= 604_800
    assert await queue.orders() == [m.Control(kind="cancel", rid="a")]
    assert [refused.code for refused in await queue.bus.step("w", StepResult(rows=[row("a", 0, 1)]))] == ["terminal"]
    assert not await queue.bus.finish("unknown", "failed", "error")


async def test_finish_takes_a_queued_request_off_the_queue(queue: Queue) -> None:
    await queue.submit("a", gateway="")
    assert await queue.bus.finish("a", "failed", "error")
    assert await queue.queued() == []
    assert await queue.deltas() == []
    assert await queue.bus.streams.entries(queue.keys.dlq) == []


# ---------------------------------------------------------------- requeue


async def test_requeue_keeps_the_tokens_and_fences_the_worker(queue: Queue) -> None:
    await queue.running("a")
    await queue.bus.step("w", StepResult(rows=[row("a", 0, 1, 2)]))
    assert await queue.requeue("a", counts=False) == {"a": "requeued"}
    assert await queue.queued() == [("a", 2)]
    assert await queue.log("a") == ids(1, 2)
    assert [refused.code for refused in await queue.bus.step("w", StepResult(rows=[row("a", 2, 3)]))] == ["stale"]
    await queue.bus.streams.create(queue.keys.work("w2"), 300)
    assert await queue.assign("a", wid="w2", epoch=2) == ("ok", [])
    fields = await queue.fields("a")
    assert (fields["epoch"], fields["start"], fields["attempts"]) == ("3", "2", "0")


async def test_a_repeated_requeue_does_not_queue_twice(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.requeue("a") == {"a": "requeued"}
    assert await queue.requeue("a") == {"a": "other"}
    assert await queue.queued() == [("a", 2)]
    assert await queue.requeue("a", "unknown", wid="elsewhere") == {"a": "other", "unknown": "other"}


async def test_requeue_leaves_the_cancelled_to_be_finished(queue: Queue) -> None:
    await queue.running("a")
    await queue.bus.cancel("a")
    for _ in range(2):
        assert await queue.requeue("a") == {"a": "cancelled"}
    assert await queue.queued() == []
    assert await queue.bus.finish("a", "cancelled", "cancelled")


async def _die(queue: Queue, rid: str, num: int, *, progress: bool) -> list[str]:
    """Let `num` workers die while they run a request; with `progress`, each writes a token first."""
    outcomes = []
    for _ in range(num):
        epoch = int((await queue.fields(rid))["epoch"])
        assert (await queue.assign(rid, epoch=epoch))[0] == "ok"
        if progress:
            length = len(await queue.log(rid)) // 4
            assert await queue.bus.step("w", StepResult(rows=[row(rid, length, 1, epoch=epoch + 1)])) == []
        outcomes.append((await queue.requeue(rid))[rid])
    return outcomes


async def test_a_request_that_kills_its_workers_is_exhausted(queue: Queue) -> None:
    await queue.submit("a")
    assert await _die(queue, "a", 3, progress=False) == ["requeued", "requeued", "exhausted"]
    assert await queue.queued() == []
    owned = (await queue.bus.owned(["a"]))[0]
    assert owned is not None
    assert (owned.attempts, owned.state) == (3, "assigned")
    assert [(death.wid, death.name, death.phase) for death in owned.deaths] == [("w", 'gpu "0"\n', "prefill")] * 3
    assert all(0 < death.assigned_ms <= death.ms <= now_ms() for death in owned.deaths)
    assert await queue.bus.finish("a", "failed", "error")


async def test_a_request_that_gets_on_survives_more_deaths_but_not_any_number(queue: Queue) -> None:
    await queue.submit("a")
    assert await _die(queue, "a", 12, progress=True) == ["requeued"] * 11 + ["exhausted"]
    assert (await queue.fields("a"))["attempts"] == "0"
    owned = (await queue.bus.owned(["a"]))[0]
    assert owned is not None
    assert [(death.num_at_start, death.num_output_tokens, death.phase) for death in owned.deaths] == [
        (i, i + 1, "decode") for i in range(12)
    ]


async def test_the_submit_entry_of_a_requeued_request_carries_its_attempts(queue: Queue) -> None:
    await queue.submit("a")
    await _die(queue, "a", 2, progress=False)
    ((_, fields),) = await queue.bus.streams.entries(queue.keys.sub("interactive"))
    assert (fields[b"e"], fields[b"a"]) == (b"4", b"2")


# ---------------------------------------------------------------- lead


async def test_one_leads_until_its_lease_ends_or_is_given_back(queue: Queue) -> None:
    bus = queue.bus
    token = await bus.lead("", "one", 60_000)
    assert token == "one:1"
    assert await bus.lead("", "two", 60_000) == ""
    assert await bus.lead(token, "one", 60_000) == token
    assert await bus.lead("", "one", 60_000) == token  # the reply to the first call was lost
    assert await bus.lead("", "on", 60_000) == ""
    assert 0 < await queue.ttl_s(queue.keys.leader) <= 60
    await bus.lead(token, "one", 0)
    assert await bus.lead("", "two", 60_000) == "two:2"
    assert await bus.lead(token, "one", 60_000) == ""


# ---------------------------------------------------------------- repair


@pytest.mark.parametrize(
    ("seq0", "given", "expected"),
    [
        (0, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (1, [2, 3, 4], [1, 2, 3, 4]),
        (2, [3], [1, 2, 3]),
        (0, [1, 2], [1, 2]),
        (0, [9], [1, 2]),
        (3, [4], [1, 2]),
    ],
)
async def test_repair_only_makes_a_log_longer_and_leaves_no_gap(
    queue: Queue, seq0: int, given: list[int], expected: list[int]
) -> None:
    await queue.running("a")
    await queue.bus.step("w", StepResult(rows=[row("a", 0, 1, 2, logprobs=ids(1, 2))]))
    for _ in range(2):
        assert await queue.bus.repair("a", seq0, ids(*given), ids(*given), 4) == len(expected)
        assert await queue.log("a") == await queue.bus._redis.get(queue.keys.lp("a")) == ids(*expected)
    assert await queue.ttl_s(queue.keys.tok("a")) > 0


async def test_repair_gives_a_lost_log_its_life_time_back(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.bus.repair("a", 0, ids(1, 2), ids(1, 2), 4) == 2
    for key in (queue.keys.tok("a"), queue.keys.lp("a")):
        assert await queue.ttl_s(key) > 3600
    assert await queue.bus.repair("unknown", 0, ids(1), b"", 0) == 0
    assert not await queue.bus._redis.exists(queue.keys.tok("unknown"))


# ---------------------------------------------------------------- position


async def test_position_counts_what_was_submitted_before(queue: Queue) -> None:
    await queue.submit("a", "b", "c")
    assert [await queue.bus.position(rid) for rid in ("a", "b", "c", "unknown")] == [0, 1, 2, None]
    await queue.assign("a")
    assert [await queue.bus.position(rid) for rid in ("a", "c")] == [None, 1]
    assert await queue.bus.position("c", limit=1) == 1


async def test_a_prompt_s_logprobs_come_with_the_first_token(queue: Queue) -> None:
    await queue.running("a")
    first = row("a", 0, 5)
    first.prompt_logprobs = make_body().prompt + b"12345678abcd"
    assert await queue.bus.step("w", StepResult([first])) == []
    assert await queue.bus.prompt_logprobs("a", 4) == (make_body().prompt, b"12345678abcd")
    assert 3600 < await queue.ttl_s(queue.keys.plp("a")) <= 3600 + DEADLINE_MS / 1000
    assert (await queue.bus.step("w", StepResult([first])))[0].code == "length"  # the reply to the first step was lost
    assert await queue.bus.prompt_logprobs("a", 4) == (make_body().prompt, b"12345678abcd")
    await queue.bus.step("w", StepResult([row("a", 1, 6, finish="stop")]))
    assert await queue.ttl_s(queue.keys.plp("a")) <= 120
    assert await queue.bus.prompt_logprobs("a", 4) == (make_body().prompt, b"12345678abcd")
    assert await queue.bus.prompt_logprobs("b", 4) is None
