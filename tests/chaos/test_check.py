"""Tests of the checker of chaos runs: it accepts correct answers and detects each kind of wrong one."""

from __future__ import annotations

import asyncio
import random
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from helpers.waiting import wait_until

from chaos.bases import ANSWER_S, DECIDE_S, MAX_SWAP_WAIT_S, Turns, longest_silence_s, silence_bound_s
from chaos.check import logged_wrongly, longest_pause, lost_webhooks, shown_wrongly, unexcused
from chaos.clients.asks import GREEDY, Ask, Expected
from chaos.clients.client import Attempt, Call, Outcome, Style
from chaos.clients.responses import doubled, misplaced, wrong_events
from chaos.clients.webhooks import HOST
from chaos.dns_server import DnsServer, answering
from chaos.faults import KILLS, OF_NAMES, OF_SWAPS, WEIGHTS, Havoc, Hit, PowerCut, draw, possible_faults
from chaos.fleet import Shape
from chaos.report import Report, as_markdown, merged
from chaos.run import Plan, Run
from chaos.soak import Course
from chaos.usage import Books, unexplained
from gateway.webhooks.names import HostNames, UnknownHostError
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.wire.messages import Delivery, HistoryEntry
from protocol.wire.records import RequestFacts

IDS = array("i", range(5)).tobytes()
EXPECTED = Expected("abcde", IDS, num_prompt_tokens=3)
RIGHT = {"prompt_tokens": 3, "completion_tokens": 5}
FACTS = RequestFacts("completed", 1, "length", "", "g", 3, 5, 0, 0, 0, 0)


def attempt(text: str, outcome: Outcome = "complete", **more: object) -> Attempt:
    made = Attempt("http://a", 10.0, 20.0, outcome, text=text)
    if outcome == "complete":
        made.finishes, made.num_done, made.usage = ["length"], 1, RIGHT
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("right", [attempt("abcde"), attempt("abc", "cut"), attempt("", "refused")])
def test_right_answers_and_beginnings_of_them_pass(right: Attempt) -> None:
    assert shown_wrongly(right, EXPECTED) == []


@pytest.mark.parametrize(
    "wrong",
    [
        attempt("abde"),  # a gap
        attempt("abccde"),  # a token twice
        attempt("abcdef"),
        attempt("abcd"),
        attempt("abcde", finishes=["length", "length"]),
        attempt("abcde", finishes=[]),
        attempt("abcde", num_done=2),
        attempt("abcde", usage={"prompt_tokens": 3, "completion_tokens": 4}),
        attempt("abd", "cut"),
        attempt("abc", "cut", finishes=["length"]),
        attempt("abcde", "failed", num_done=1),
    ],
)
def test_every_wrong_answer_is_found(wrong: Attempt) -> None:
    assert len(shown_wrongly(wrong, EXPECTED)) == 1


def test_an_error_that_is_not_json_is_one_thing_more_that_is_wrong() -> None:
    told = attempt("", "cut")
    told.refuse(500, b"Internal Server Error", httpx2.Headers())
    assert (told.outcome, told.code) == ("failed", "not_json")
    assert unexcused(told, [Hit("queue", "queue", "kill", 15.0, 16.0)])


def test_logs_hold_the_right_tokens_and_their_end() -> None:
    assert logged_wrongly(EXPECTED, FACTS, IDS, whole=True) == []
    assert logged_wrongly(EXPECTED, None, IDS[:8], whole=False) == []
    assert logged_wrongly(EXPECTED, FACTS, IDS[:16], whole=True) == [
        "the log holds 4 tokens, right up to 4 of 5, then []"
    ]
    assert logged_wrongly(EXPECTED, None, IDS[4:8], whole=False) == [
        "the log holds 1 tokens, right up to 0 of 5, then [1]"
    ]
    assert logged_wrongly(EXPECTED, None, b"", whole=True) == ["the queue does not know the request"]
    running = RequestFacts("assigned", 1, "", "", "g", 3, 5, 0, 0, 0, 0)
    assert logged_wrongly(EXPECTED, running, IDS, whole=True) == ["the queue says assigned, ''"]


def test_only_a_fault_of_the_right_kind_place_and_time_excuses_a_cut() -> None:
    cut = attempt("ab", "cut")
    assert unexcused(cut, []) == "cut"
    assert unexcused(cut, [Hit("gateway", "g", "kill", 15.0, 17.0, url="http://a")]) == ""
    assert unexcused(cut, [Hit("gateway", "g", "kill", 15.0, 17.0, url="http://b")])
    assert unexcused(cut, [Hit("gateway", "g", "kill", 25.0, 27.0, url="http://a")])
    assert unexcused(cut, [Hit("worker", "w", "kill", 15.0, 17.0)])
    assert unexcused(attempt("", "failed", code="internal_error"), [Hit("queue", "queue", "kill", 15.0, 16.0)])


def test_a_base_whose_starts_were_killed_may_count_as_failed() -> None:
    told = attempt("", "refused", code="base_failed")
    kills = [Hit("worker", "w0", "kill in a swap", at_s, at_s) for at_s in (1.0, 2.0)]
    kills.append(Hit("worker", "w0", "kill", 3.0, 3.0))
    assert unexcused(told, kills) == ""
    assert unexcused(told, kills[1:])
    assert unexcused(told, [*kills[1:], Hit("worker", "w0", "stop", 3.0, 4.0), Hit("queue", "queue", "kill", 3.0, 4.0)])
    assert unexcused(told, [*kills[1:], Hit("worker", "w0", "kill", 21.0, 22.0)]), "after it"


def called(style: Style, *attempts: Attempt) -> Call:
    return Call(Ask("sql", "p", 5, ()), style, 0.0, list(attempts))


def test_usage_lies_between_what_was_told_and_what_was_caused() -> None:
    books = Books()
    books.note(called("stream", attempt("abcde")), EXPECTED)
    books.note(
        called("whole", attempt("", "cut"), attempt("", "refused", code="queue_full"), attempt("abcde")), EXPECTED
    )
    books.note(called("job", attempt("ab", "cut"), attempt("abcde")), EXPECTED)
    told, most = (3, 9, 15), (4, 12, 20)
    for right in (told, (4, 9, 17), most):
        assert books.wrong({"sql": right}, may_lack=False, may_exceed=False) == []
    for wrong in ((2, 9, 15), (3, 9, 14), (5, 12, 20), (4, 12, 21)):
        assert len(books.wrong({"sql": wrong}, may_lack=False, may_exceed=False)) == 1
        assert books.wrong({"sql": wrong}, may_lack=True, may_exceed=True) == []
    assert len(books.wrong({"sql": told, "base": (1, 1, 1)}, may_lack=False, may_exceed=False)) == 1


def test_calls_that_were_taken_and_told_an_error_may_be_in_the_books() -> None:
    door, ended = (
        f"503: this gateway is shutting down; retry, so that another one can take {what}"
        for what in ("the request", "it")
    )
    for code, detail, num in (
        ("queue_unavailable", "", 2), ("shutting_down", "503: this gateway is shutting down", 2),
        ("shutting_down", ended, 2), ("base_failed", "", 2), ("shutting_down", door, 1), ("queue_full", "", 1),
    ):  # fmt: skip
        for style in ("whole", "vector"):
            books = Books()
            books.note(called(style, attempt("", "refused", code=code, detail=detail), attempt("abcde")), EXPECTED)
            assert books.most == {"sql": (num, 3 * num, 5 * num)}


def test_every_vector_that_was_cut_off_may_be_in_the_books() -> None:
    """Requests for vectors have no Idempotency-Key, so an interrupted one may have been charged."""
    books = Books()
    books.note(called("vector", attempt("", "cut"), attempt("", "cut"), attempt("abcde")), EXPECTED)
    assert books.least == {"sql": (1, 3, 5)}
    assert books.most == {"sql": (3, 9, 15)}


def ended(rid: str, submitted_ms: int, state: str = "completed", num_output: int = 0) -> HistoryEntry:
    return HistoryEntry(
        rid, rid, '["sql","d"]', "interactive", state, "", "", "w", 3, 0, num_output, 1, submitted_ms, 0, 0
    )


def test_requests_that_no_attempt_has_caused_are_named() -> None:
    calls = [
        called("vector", attempt("", "cut"), attempt("", "refused", code="queue_full"), attempt("abcde")),
        called("keyed whole", attempt("", "cut"), attempt("abcde")),
    ]  # each attempt begins at 10 s and ends at 20 s
    ends = [ended(rid, 100_000 + at_ms) for rid, at_ms in (("a", 15_000), ("b", 19_000), ("c", 12_000))]
    assert unexplained(calls, ends, 100_000.0) == []
    assert [one.rid for one in unexplained(calls, [*ends, ended("d", 119_900)], 100_000.0)] == ["d"]
    assert [one.rid for one in unexplained(calls, [ended("e", 125_000)], 100_000.0)] == ["e"]
    nothing = [ended("f", 200_000, "cancelled"), ended("g", 200_000, "refused", 1)]
    assert unexplained(calls, nothing, 100_000.0) == []
    assert len(unexplained(calls, [ended("h", 200_000, "cancelled", 1)], 100_000.0)) == 1


def test_the_pause_of_a_fault_is_the_longest_one_that_begins_with_it() -> None:
    call = Call(Ask("base", "x", 5, tuple(GREEDY.items())), "stream", 0.0)
    call.progress = [(1.0, 1), (2.0, 2), (7.0, 3), (8.0, 4), (30.0, 5)]
    assert longest_pause(call, 2.5, 5.0) == 5.0
    assert longest_pause(call, 7.5, 5.0) == 22.0
    assert longest_pause(call, 0.5, 5.0) is None
    assert longest_pause(call, 31.0, 5.0) is None


def test_one_of_those_that_have_standbys_is_always_left_alone() -> None:
    rng = random.Random(0)
    everything = {"worker": ["w0", "w1"], "gateway": ["g0", "g1"], "scheduler": ["s0", "s1"]}
    everything |= {"store": ["store"], "queue": ["queue"], "files": ["files"]}
    assert {(kind, how) for kind, _, how in (draw(rng, everything) or ("", "", "kill") for _ in range(500))} == set(
        WEIGHTS
    )
    few = {"worker": ["w0"], "gateway": ["g1"], "scheduler": [], "store": ["store"]}
    assert {choice[0] for _ in range(50) if (choice := draw(rng, few))} == {"store"}
    assert draw(rng, {"worker": ["w0"]}) is None


def test_every_fault_is_done_once_before_chance_decides(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, has_swaps=False)
    havoc = Havoc(fleet, random.Random(0), kills_only=True)
    assert {havoc.choose({"store": ["store"]}) for _ in range(3)} == {
        ("store", "store", "kill"), ("store", "store", "stop"), ("store", "store", "drain")
    }  # fmt: skip
    everything = {kind: ["a", "b"] for kind, _ in WEIGHTS}
    chosen = [choice for _ in range(100) if (choice := havoc.choose(everything))]
    first, others = chosen[: len(WEIGHTS) - 3], chosen[len(WEIGHTS) - 3 :]
    assert len({(kind, how) for kind, _, how in first}) == len(first)
    assert "store" not in {kind for kind, _, _ in first}
    assert {how for _, _, how in others} == {how for _, how in WEIGHTS if how in KILLS}
    assert {kind for kind, _, _ in others} == {kind for kind, how in WEIGHTS if how in KILLS}


# ---------------------------------------------------------------- several bases


def fleet_of(tmp_path: Path, **more: Any) -> Any:
    queue = EmbeddedServer(tmp_path, durable=True, guarded=False)
    return SimpleNamespace(**{"queue": queue, "clocks": None, "names": None, "has_swaps": True, "members": {}} | more)


def test_names_hang_where_they_are_the_driver_s(tmp_path: Path) -> None:
    assert OF_NAMES.items() <= possible_faults(fleet_of(tmp_path, names=DnsServer())).items()
    assert not OF_NAMES.keys() & possible_faults(fleet_of(tmp_path)).keys()


async def test_a_dns_server_that_hangs_answers_later() -> None:
    async with answering(DnsServer({HOST: ["127.0.0.1"]})) as server:
        names = HostNames(server.address, lookup_s=0.3)
        server.hangs = True
        with pytest.raises(UnknownHostError, match="no DNS server answers within"):
            await names.addresses(HOST)
        assert server.asked[HOST] >= 2
        server.hangs = False
        assert await HostNames(server.address).addresses(HOST) == ["127.0.0.1"]


def test_workers_are_killed_in_swaps_where_there_are_swaps(tmp_path: Path) -> None:
    assert OF_SWAPS.items() <= possible_faults(fleet_of(tmp_path)).items()
    assert not OF_SWAPS.keys() & possible_faults(fleet_of(tmp_path, has_swaps=False)).keys()


@pytest.mark.parametrize(("has_swaps", "hit"), [(True, {"loads"}), (False, set[str]())])
async def test_a_worker_that_loads_a_base_is_hit_where_there_are_swaps(
    tmp_path: Path, has_swaps: bool, hit: set[str]
) -> None:
    async def is_up(_: Any) -> bool:
        return False

    members = {
        name: SimpleNamespace(name=name, service="worker", is_running=name == "loads") for name in ("loads", "ended")
    }
    havoc = Havoc(fleet_of(tmp_path, has_swaps=has_swaps, members=members, is_up=is_up), random.Random(0))
    assert set((await havoc._up()).get("worker", [])) == hit


def test_a_base_is_silent_from_one_answer_to_the_next_and_to_both_ends() -> None:
    assert longest_silence_s([1.0, 12.0, 14.0, 90.0], 10.0, 20.0) == 6.0
    assert longest_silence_s([16.0, 12.0], 10.0, 17.0) == 4.0  # times may be recorded out of order
    assert longest_silence_s([], 10.0, 17.0) == 7.0


def test_the_bound_on_silence_is_that_of_swaps_and_of_one_answer() -> None:
    rest_s = DECIDE_S + ANSWER_S
    assert silence_bound_s(3, 2, 19.0) == MAX_SWAP_WAIT_S + 19.0 + rest_s
    assert silence_bound_s(3, 2, 20.0) == 5 * 3 * 20.0 / 2 + 20.0 + rest_s  # two workers cannot keep the bound


def test_each_base_has_clients_of_its_own_and_some_ask_all() -> None:
    turns = Turns({"base": "base", "sql": "base", "base-1": "base-1", "of-base-1": "base-1"})
    asks = [Ask(model, "p", 5, ()) for model in ("base", "sql", "base-1", "of-base-1")]
    assert [turns.asks_of(client, asks) for client in range(4)] == [asks, asks[:2], asks[2:], asks]
    assert Turns({"base": "base"}).asks_of(3, asks[:1]) == asks[:1]


def test_a_base_that_answers_nothing_without_faults_is_told() -> None:
    plan = Plan(1, 1.0, 1, 1, 1.0, Shape(), more_bases=("base-1",))
    turns = Turns(plan.models(["sql"]))
    for at_s in range(100):
        turns.note("sql", at_s)
    assert turns.silent(0.0, 99.0, 20.0) == ["without faults, base-1 answered nothing for 99.0 s; the bound is 20.0 s"]
    for at_s in range(0, 100, 15):
        turns.note("of-base-1", at_s)
    assert turns.silent(0.0, 99.0, 20.0) == []
    assert turns.silences_s == {"base": 1.0, "base-1": 15.0}


class ShortRun(Run):
    """A run whose time for faults ends at once, with clients that are answered at once."""

    num_answers = 0

    async def _be_client(self, number: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.num_answers += 1
            await asyncio.sleep(0)

    def _rss(self) -> dict[str, float]:
        return {}

    async def _check_end(self) -> None:
        pass


async def test_bases_are_asked_while_their_turns_are_watched(tmp_path: Path) -> None:
    """Also if the time for faults ends before all of them have been injected."""

    async def newest(num: int) -> list[Any]:
        return []

    async def no_faults(num: int, every_s: float, stop: asyncio.Event, *, alone: bool) -> None:
        await stop.wait()

    async def watch(*_: object) -> list[str]:
        before = run.num_answers
        await wait_until(lambda: run.num_answers > before + 10, "clients go on")
        return []

    bus = SimpleNamespace(audit=SimpleNamespace(newest=newest))
    queue = EmbeddedServer(tmp_path, durable=True, guarded=False)
    fleet = fleet_of(tmp_path, urls=["http://a"], bus=bus, queue=queue)
    plan = Plan(1, 1.0, 1, 1, 0.0, Shape(), more_bases=("base-1",))
    run = ShortRun(fleet, plan, [Ask("base", "p", 5, ())])
    run.havoc = cast(Any, SimpleNamespace(run=no_faults, hits=[], troubles=[]))
    run._turns = cast(Any, SimpleNamespace(watch=watch, silences_s={}))
    await run.run()
    await run.close()
    assert run.tally.violations == []


def test_swaps_are_reported_and_merged() -> None:
    def report(num: int, **silences_s: float) -> Report:
        return Report(
            "",
            "",
            [],
            60.0,
            {"worker: kill in a swap": num},
            {},
            {},
            {},
            0,
            {},
            [],
            num_swaps=num,
            silences_s=silences_s,
        )

    text = as_markdown(merged([report(3, a=2.0, b=1.0), report(4, a=1.0, b=5.0)]))
    assert "7 swaps; longest without an answer after the faults: a 2.0 s, b 5.0 s." in text
    assert "7 faults, 7 of them kills" in text
    assert "swaps" not in as_markdown(report(0)).replace("in a swap", "")


def test_a_refusal_is_honest_when_enough_has_ended_in_the_time_it_told() -> None:
    course = Course(completed_s=[1.0, 2.0, 3.0, 9.0], refusals=[(0.5, 2.0), (1.5, 1.0), (2.5, 7.0), (8.0, 2.0)])
    assert course.share_kept(1) == 1.0
    assert course.share_kept(2) == 0.5


def test_a_power_cut_takes_the_end_of_the_queues_file(tmp_path: Path) -> None:
    folder = tmp_path / "appendonlydir"
    folder.mkdir()
    file = folder / "appendonly.aof.2.incr.aof"
    (folder / "appendonly.aof.1.incr.aof").write_bytes(b"older")
    power = PowerCut(tmp_path)
    for size in (10, 20, 30):
        file.write_bytes(bytes(size))
        power.note()
    file.write_bytes(bytes(35))
    assert power.cut(60.0) == 25
    assert file.stat().st_size == 10


def test_a_power_cut_soon_after_another_adds_nothing_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "appendonlydir" / "appendonly.aof.1.incr.aof"
    file.parent.mkdir()
    power = PowerCut(tmp_path)
    for size in (20, 30):
        file.write_bytes(bytes(size))
        power.note()
    assert power.cut(60.0) == 10
    file.write_bytes(bytes(18))  # the server removes an incomplete command
    assert power.cut(60.0) == 0
    assert file.stat().st_size == 18


# ---------------------------------------------------------------- responses and conversations


def response(status: str = "completed", output: str = "o") -> dict[str, Any]:
    items = [{"id": output, "content": [{"text": output}]}]
    return {"id": "resp_1", "status": status, "output": items, "error": None}


def events(end: dict[str, Any], *numbers: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"type": "response.output_text.delta", "sequence_number": n} for n in numbers]
    return [*made, {"type": f"response.{end['status']}", "sequence_number": len(numbers), "response": end}]


def test_events_that_are_the_same_each_time_pass() -> None:
    assert wrong_events(response(), [events(response(), 0, 1)] * 3) == []


@pytest.mark.parametrize(
    "reads",
    [
        [events(response(), 0, 2)],  # a gap
        [events(response(), 0, 0)],  # one event twice
        [[*events(response(), 0), *events(response())]],  # two ends
        [events(response(), 0)[:-1]],  # no end
        [events(response(output="p"), 0)],  # an event of another response
        [events(response(), 0), [{**event, "x": 1} for event in events(response(), 0)]],
    ],
)
def test_every_wrong_stream_of_events_is_found(reads: list[list[dict[str, Any]]]) -> None:
    assert wrong_events(response(), reads) != []


def test_a_failed_response_is_found() -> None:
    end = response("failed")
    assert wrong_events(end, [events(end, 0)]) == ["it has failed: None"]


def said(text: str) -> dict[str, Any]:
    return {"id": text, "content": [{"text": text}]}


GROUPS = [[("a", response(output="A"))], [("b", response(output="B")), ("c", response(output="C"))],
          [("d", response("cancelled"))], [("e", response("incomplete", "E"))]]  # fmt: skip


@pytest.mark.parametrize("order", ["0aAbBcCeE", "0aAcCbBeE"])
def test_turns_in_their_places_pass(order: str) -> None:
    assert misplaced([said(text) for text in order], GROUPS) == []


@pytest.mark.parametrize(
    "order",
    ["0aAbBcC", "0aAbBcCeEeE", "0aAbcBCeE", "0bBcCaAeE", "0aAbBcCdoeE", "0aAbBbBcCeE", "0aAbBcCe", "0aAbBeEcC", "0"],
)
def test_turns_that_are_lost_doubled_or_torn_are_found(order: str) -> None:
    assert misplaced([said(text) for text in order], GROUPS) != []


def test_an_item_that_is_there_twice_is_found() -> None:
    items = [{**said(text), "role": "user"} for text in "0ab"]
    assert doubled(items) == []
    assert len(doubled([*items, {**said("a"), "role": "user", "id": "z"}])) == 1  # another item with the same input
    assert len(doubled([*items, said("b")])) == 1


def test_a_webhook_that_waits_for_a_late_attempt_is_not_lost() -> None:
    def tried(subject: str, attempts: int) -> Delivery:
        return Delivery("", "", "", "", "batch.completed", subject, 0, attempts, "no answer within 15 s")

    never = [("batch.completed", id_) for id_ in ("late", "held up", "lost")]
    assert lost_webhooks(never, [tried("late", 3), tried("held up", 2)], max_tries=2) == [
        "the webhook of batch.completed held up waits after 2 attempts: no answer within 15 s",
        "no webhook has told of batch.completed lost, and none waits",
    ]


def test_a_vector_is_right_within_rounding() -> None:
    expected = Expected("", b"", num_prompt_tokens=3, vector=(0.5, -0.25))
    right = attempt("", vector=[0.5001, -0.25], usage={"prompt_tokens": 3})
    assert shown_wrongly(right, expected) == []
    for vector in ([0.5, -0.24], [0.5], []):
        assert shown_wrongly(attempt("", vector=vector, usage={"prompt_tokens": 3}), expected), vector
    assert shown_wrongly(attempt("", vector=[0.5, -0.25], usage={"prompt_tokens": 4}), expected)
    assert shown_wrongly(attempt("", "failed"), expected) == []
