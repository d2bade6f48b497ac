"""The engine and its thread: every request ends exactly once, whatever fails in it or beside it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest
import torch
from helpers import examples
from helpers.factories import make_adapter, make_tiny_model

from gpu_worker.adapters.failures import LoadFailures
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import load_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.engine_thread import MAX_UNACKED_STEPS
from gpu_worker.engine.runner import StepInputs
from gpu_worker.planning.request import EngineRequest, TokenOutput
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, parse_config
from peft_adapters.texts.tokenizer_json import AddedToken
from protocol.runtime.backoff import Backoff
from protocol.runtime.settings import Settings
from protocol.wire.errors import AdapterRefused, BadRequest, Internal, LorafleetError, NotFound, Unavailable
from protocol.wire.messages import Sampling

GREEDY = Sampling(temperature=0.0, ignore_eos=True)


class Panic(BaseException):
    """A panic of a Rust library, which is not an `Exception`."""


class Store:
    """A folder's adapters; fetching blocks while `open` is cleared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open = threading.Event()
        self.open.set()
        self.fetched: list[str] = []
        self.added: dict[str, list[AddedToken]] = {}  # digest -> tokens that the adapter adds to the base's

    def fetch(self, digest: str) -> FetchedAdapter:
        assert self.open.wait(timeout=60)
        self.fetched.append(digest)
        folder = self.folder / digest
        if not folder.is_dir():
            raise NotFound(f"no adapter {digest}")
        if digest == "crash":
            raise RuntimeError("a fault of ours")
        if digest == "panic":
            raise Panic
        config, weights = parse_config((folder / CONFIG_FILE).read_bytes()), (folder / WEIGHTS_FILE).read_bytes()
        return FetchedAdapter(config, weights, self.added.get(digest))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    make_tiny_model(folder / "model")
    make_adapter(folder / "warm", folder / "model", seed=1)
    make_adapter(folder / "cold", folder / "model", seed=2)
    make_adapter(folder / "wide", folder / "model", rank=64, seed=3)
    make_adapter(folder / "cut", folder / "model", seed=4)
    (folder / "crash").mkdir()
    (folder / "panic").mkdir()
    weights = folder / "cut" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-8])
    return folder


class Running:
    """An engine in its thread, with its outputs."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.store = Store(folder)
        values: dict[str, Any] = {"model": str(folder / "model"), "device": "cpu", "dtype": "float32"}
        values |= {"adapter_pool_bytes": 16 << 20, "kv_cache_bytes": 16 << 20, **settings}
        self.thread, self.served = load_engine(Settings(**values), self.store.fetch)
        engine = self.thread.engine
        assert isinstance(engine, Engine)
        self.engine = engine
        self.steps: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
        self.death: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.acks = True
        self.thread.start(self._on_outputs, self.death.put)

    def _on_outputs(self, outputs: list[TokenOutput]) -> None:
        self.steps.put(outputs)
        if self.acks:
            self.thread.ack_step()

    def ends(self, rids: set[str]) -> dict[str, TokenOutput]:
        """Wait until these requests end; return their last outputs. Check that outputs continue each other."""
        ends: dict[str, TokenOutput] = {}
        self.ids: dict[str, list[int]] = {}
        while rids - ends.keys():
            for output in self.steps.get(timeout=60):
                assert output.rid not in ends
                ids = self.ids.setdefault(output.rid, [])
                assert output.seq0 == len(ids)
                ids += output.ids
                if output.finish:
                    ends[output.rid] = output
        return ends


@pytest.fixture(params=examples.some(["off", "on"], "off"))
def running(folder: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    running = Running(folder, overlap=request.param)
    yield running
    running.thread.stop()


def request(
    rid: str,
    digest: str = "",
    num_tokens: int = 4,
    prompt: Iterable[int] = (5, 6, 7, 8),
    sampling: Sampling = GREEDY,
    **fields: Any,
) -> EngineRequest:
    return EngineRequest(rid, 1, digest, np.array([*prompt], np.int32), sampling, num_tokens, **fields)


def replace_sampling(**fields: Any) -> Sampling:
    """Return greedy sampling with the given fields, without validation."""
    return msgspec.structs.replace(GREEDY, **fields)


def test_an_adapter_that_cannot_be_had_fails_its_requests_only(running: Running) -> None:
    wanted = {"missing": "missing", "cut": "cut", "crash": "crash", "panic": "panic", "good": "warm", "base": ""}
    for rid, digest in wanted.items():
        running.thread.submit(request(rid, digest))
    ends = running.ends(set(wanted))
    assert {rid: end.finish for rid, end in ends.items()} == {
        "missing": "error", "cut": "error", "crash": "error", "panic": "error", "good": "length", "base": "length",
    }  # fmt: skip
    assert isinstance(ends["missing"].error, NotFound)
    assert isinstance(ends["cut"].error, AdapterRefused)
    assert isinstance(ends["crash"].error, LorafleetError)
    assert isinstance(ends["panic"].error, LorafleetError)
    assert "fault of ours" not in str(ends["crash"].error)


def test_a_failed_adapter_is_tried_again_for_a_new_request(running: Running) -> None:
    running.engine.adapters._failures = LoadFailures(trouble=Backoff(0.0, 0.0))
    for _ in range(2):
        running.thread.submit(request("x", "missing"))
        running.ends({"x"})
    assert running.store.fetched == ["missing", "missing"]


def test_nothing_waits_for_a_cold_adapter(running: Running) -> None:
    running.store.open.clear()
    running.thread.submit(request("cold", "cold"))
    running.thread.submit(request("base"))
    assert running.ends({"base"})["base"].finish == "length"
    assert running.thread.stats().waiting_adapter == 1
    running.store.open.set()
    assert running.ends({"cold"})["cold"].finish == "length"
    assert "cold" in running.thread.stats().resident


def test_all_caches_have_memory_ahead_of_use(folder: Path) -> None:
    """For keys and values as for adapters' rows, more of the cache has memory than was ever used."""
    running = Running(folder, kv_cache_bytes=64 << 20, adapter_pool_bytes=64 << 20)
    engine = running.engine
    keys, (attention, mlp, _) = engine.runner.ahead, engine.adapters.weights.ahead
    running.thread.submit(request("a", "warm", prompt=range(5, 105)))
    running.ends({"a"})
    running.thread.stop()
    while engine.extend_memory():
        pass
    assert keys.num_provided < engine.config.num_blocks
    assert 0 < engine.blocks.num_ever_used < keys.num_provided
    for ahead, num_used in zip((attention, mlp), engine.adapters.pool.num_ever_used, strict=False):
        assert 0 < num_used < ahead.num_provided


def test_what_ends_a_text_is_found_with_the_adapters_own_tokens(folder: Path) -> None:
    running = Running(folder)
    own = [AddedToken(i, f"word{i}", special=False) for i in range(running.served.vocab_size)]
    running.store.added = {"warm": own}
    running.thread.submit(request("plain", "warm"))
    running.ends({"plain"})
    ids = running.ids["plain"]
    assert ids[1] != ids[0]
    wanted = {"own": "warm", "base": "", "other": "cold"}
    ways: list[dict[str, Any]] = [
        {"stop": [f"word{ids[1]}"]},
        {"sampling": replace_sampling(stop_regex=["never", f"[vw]o?rd{ids[1]}"])},
    ]
    for i, way in enumerate(ways):
        names = {f"{name}{i}": digest for name, digest in wanted.items()}
        for rid, digest in names.items():
            running.thread.submit(request(rid, digest, **way))
        ends = running.ends(set(names))
        assert [ends[f"{name}{i}"].finish for name in wanted] == ["stop", "length", "length"]
        assert running.ids[f"own{i}"] == ids[:2]
        for num_known, num_new in (
            (1, 1),
            (2, 0),
        ):  # two: the last worker died before it reported the end
            running.thread.submit(request("resumed", "warm", output=ids[:num_known], **way))
            [end] = running.steps.get(timeout=60)
            assert (end.finish, end.seq0, end.ids) == ("stop", num_known, ids[num_known:][:num_new])
    running.thread.stop()


def test_an_adapter_larger_than_the_pool_is_refused_with_the_reason(folder: Path) -> None:
    running = Running(folder, adapter_pool_bytes=1 << 18)
    running.thread.submit(request("wide", "wide"))
    running.thread.submit(request("base"))
    ends = running.ends({"wide", "base"})
    assert isinstance(ends["wide"].error, AdapterRefused)
    assert "adapter pool" in str(ends["wide"].error)
    assert ends["base"].finish == "length"
    running.thread.stop()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("bad", prompt=[]), "empty"),
        (request("bad", prompt=[5] * 512), "at most 512"),
        (request("bad", prompt=[5, 100_000]), "outside"),
        (request("bad", prompt=[5, -1]), "outside"),
        (request("bad", num_tokens=0), "max_new_tokens"),
        (request("bad", sampling=Sampling(logit_bias={100_000: 1.0})), "outside"),
        (request("bad", stop_token_ids=[-3]), "outside"),
    ],
    ids=["empty", "long", "high id", "negative id", "no tokens", "bias", "stop id"],
)
def test_what_cannot_be_computed_is_refused(running: Running, bad: EngineRequest, message: str) -> None:
    running.thread.submit(bad)
    running.thread.submit(request("good"))
    ends = running.ends({"bad", "good"})
    assert isinstance(ends["bad"].error, BadRequest)
    assert message in str(ends["bad"].error)
    assert ends["good"].finish == "length"


@pytest.mark.parametrize(
    "bad",
    [
        request("bad", stop=[3]),
        request("bad", sampling=replace_sampling(repetition_penalty="2")),
        request("bad", sampling=replace_sampling(min_tokens="2")),
        request("bad", "warm", sampling=replace_sampling(repetition_penalty="2")),
    ],
    ids=["accepted", "adjusted", "banned", "with an adapter"],
)
def test_a_request_whose_own_data_makes_a_step_raise_fails_alone(running: Running, bad: EngineRequest) -> None:
    running.thread.submit(request("good", "warm", num_tokens=30))
    running.thread.submit(bad)
    ends = running.ends({"bad", "good"})
    assert isinstance(ends["bad"].error, Internal)
    assert len(running.ids["good"]) == 30
    assert running.death.empty()


@pytest.mark.parametrize("when", ["bind", "accept"])
def test_a_panic_is_the_adapters_fault_and_nobody_elses(running: Running, when: str) -> None:
    def panic(*_args: object, **_options: object) -> NoReturn:
        raise Panic("called `Option::unwrap()` on a `None` value")

    binder = running.engine._binder
    bind = binder.bind

    def bind_badly(seq: Sequence) -> str:
        if seq.rid != "bad":
            return bind(seq)
        if when == "bind":
            panic()
        finish = bind(seq)
        assert seq.stop_rules is not None
        seq.stop_rules.add = panic
        return finish

    binder.bind = bind_badly
    for rid in ("bad", "good"):
        running.thread.submit(request(rid, "warm"))
    ends = running.ends({"bad", "good"})
    assert isinstance(ends["bad"].error, AdapterRefused)
    assert (ends["good"].finish, running.ids["good"]) == ("length", running.ids["good"][:4])
    assert running.death.empty()
    stats = running.thread.stats()
    assert (stats.running, stats.kv_blocks_free) == (0, stats.kv_blocks_total)


def test_output_ends_at_the_models_length(running: Running) -> None:
    running.thread.submit(request("x", prompt=[5] * 500, num_tokens=100))
    assert running.ends({"x"})["x"].finish == "length"
    assert len(running.ids["x"]) == 12


@pytest.mark.parametrize(
    ("fields", "finish"),
    [({"output": [9, 9, 9, 9]}, "length"), ({"output": [9, 0], "sampling": Sampling()}, "stop")],
    ids=["length", "stop"],
)
def test_a_resumed_request_that_had_ended_only_ends(running: Running, fields: dict[str, Any], finish: str) -> None:
    running.thread.submit(request("x", **fields))
    (end,) = running.steps.get(timeout=60)
    assert (end.finish, end.ids, end.seq0) == (finish, [], len(fields["output"]))


def test_a_cancelled_request_is_silent_and_frees_everything(running: Running) -> None:
    running.thread.submit(request("x", "warm", num_tokens=400))
    running.steps.get(timeout=60)
    running.thread.cancel(["x", "never-seen"])
    running.thread.submit(request("y"))
    steps = [running.steps.get(timeout=60)]
    while not any(output.finish for output in steps[-1]):
        steps.append(running.steps.get(timeout=60))
    rids = [{output.rid for output in step} for step in steps]
    assert rids[-4:] == [{"y"}] * 4
    assert all(step == {"x"} for step in rids[:-4])
    stats = running.thread.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_a_second_delivery_is_ignored_and_a_newer_epoch_replaces(running: Running) -> None:
    running.store.open.clear()
    for epoch in (1, 1, 3, 2):
        running.thread.submit(replace(request("x", "warm"), epoch=epoch))
    running.store.open.set()
    assert running.ends({"x"})["x"].epoch == 3
    assert len(running.ids["x"]) == 4
    assert running.thread.stats().running == 0


def test_a_leak_is_a_crash(folder: Path) -> None:
    running = Running(folder)
    running.engine.blocks.allocate(1)
    running.thread.submit(request("x"))
    assert isinstance(running.death.get(timeout=60), AssertionError)
    running.thread.stop()


def test_handing_over_names_every_request_and_forgets_it(running: Running) -> None:
    running.store.open.clear()
    for rid, digest in (("a", "warm"), ("b", ""), ("c", "")):
        running.thread.submit(request(rid, digest, num_tokens=400))
    assert sorted(running.thread.hand_over().result(timeout=60)) == ["a", "b", "c"]
    running.store.open.set()
    running.thread.submit(request("d"))
    assert running.ends({"d"})["d"].finish == "length"


def test_the_engine_waits_for_steps_to_be_acknowledged(folder: Path) -> None:
    running = Running(folder)
    running.acks = False
    running.thread.submit(request("x", num_tokens=50))
    running.thread.submit(request("last", num_tokens=1))
    most = MAX_UNACKED_STEPS
    steps = [running.steps.get(timeout=60) for _ in range(most)]
    assert running.thread.hand_over().result(timeout=60) == ["x"]
    assert running.steps.empty()
    assert sum(len(output.ids) for step in steps for output in step if output.rid == "x") <= most
    for _ in range(most):
        running.thread.ack_step()
    running.thread.submit(request("y", num_tokens=2))
    assert running.steps.get(timeout=60)[0].rid == "y"
    running.thread.stop()


def test_a_crash_is_reported_once_and_nothing_hangs(folder: Path) -> None:
    running = Running(folder)

    def crash() -> list[TokenOutput]:
        raise RuntimeError("out of luck")

    running.engine.step = crash
    running.thread.submit(request("x"))
    assert str(running.death.get(timeout=60)) == "out of luck"
    running.thread.submit(request("y"))
    assert running.thread.hand_over().result(timeout=60) == []
    running.thread.stop()
    assert running.death.empty()


def test_stopping_ends_the_thread_without_a_death(folder: Path) -> None:
    running = Running(folder)
    running.thread.submit(request("x", num_tokens=400))
    running.thread.stop()
    assert running.death.empty()
    assert not running.thread._thread.is_alive()


def test_prefetching_makes_an_adapter_resident(running: Running) -> None:
    running.thread.prefetch("warm")
    running.thread.prefetch("missing")
    running.thread.submit(request("x", "warm"))
    running.ends({"x"})
    assert running.store.fetched.count("warm") == 1


def test_served_model_tells_what_adapters_can_target(running: Running) -> None:
    sites = {site.name: site for site in running.served.sites}
    assert sites["model.layers.1.self_attn.k_proj"].out_features == 32
    assert sites["lm_head"].kind == "linear"
    assert sites["model.embed_tokens"].kind == "embedding"
    assert sites["model.layers.0.input_layernorm"].kind == "norm"
    assert len(sites) == 2 * 7 + 2 + 2 * 2 + 1
    assert running.served.max_model_len == 512


def test_what_steps_cost_is_learnt_with_the_adapters_that_ran(running: Running) -> None:
    learnt: list[tuple[float, int, int, int]] = []

    def add(seconds: float, num_tokens: int, num_kv_tokens: int, sum_ranks: int, num_passes: int = 0) -> None:
        assert num_passes == 0, "packed steps have none"
        learnt.append((seconds, num_tokens, num_kv_tokens, sum_ranks))

    running.engine.meter.fit.add = add
    running.thread.submit(request("x", "warm", num_tokens=3))
    running.ends({"x"})
    works = [work for _, *work in learnt]
    assert works == [[4, 4, 8], [1, 5, 8], [1, 6, 8]]
    assert all(seconds > 0 for seconds, *_ in learnt)


def test_a_worker_counts_what_it_did(folder: Path) -> None:
    """The pool holds one adapter at a time."""
    running = Running(folder, adapter_pool_bytes=160_000)
    prompt = list(range(5, 45))
    for rid, digest in (("a", "warm"), ("b", "warm"), ("c", "cold")):
        running.thread.submit(request(rid, digest, num_tokens=3, prompt=prompt))
        running.ends({rid})
    running.thread.stop()
    stats = running.engine.stats()
    counters = stats.counters
    assert counters.num_steps == 9
    assert counters.num_output_tokens == 9
    assert counters.num_cached_tokens == 32  # of the second request, which repeats prompt and adapter
    assert counters.num_computed_tokens == 3 * (40 + 2) - 32
    assert (stats.num_loads, counters.num_evictions) == (2, 1)
    phases = (counters.plan_s, counters.inputs_s, counters.forward_s, counters.sample_s, counters.finish_s)
    assert all(seconds > 0 for seconds in phases)


class FullRunner:
    """Runs steps of at most `most` tokens; larger ones fail as if device memory ran out."""

    def __init__(self, engine: Engine, most: int, *, after_forward: bool) -> None:
        self._runner, self._most, self._after = engine.runner, most, after_forward
        self.num_refused = 0
        self._is_too_large = False

    def prepare(self, plan: StepPlan, coming: torch.Tensor | None = None) -> StepInputs:
        self._is_too_large = plan.num_tokens > self._most
        return self._runner.prepare(plan, coming)

    def run(self, inputs: StepInputs) -> torch.Tensor:
        logits = self._runner.run(inputs) if self._after else torch.empty(0)
        if self._is_too_large:
            self.num_refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits if self._after else self._runner.run(inputs)


@pytest.mark.parametrize(("after_forward", "overlap"), [(False, "off"), (True, "off"), (True, "on")])
def test_a_step_without_memory_fails_its_largest_requests_alone(
    folder: Path, after_forward: bool, overlap: str
) -> None:
    rng = np.random.default_rng(0)
    wanted = {f"small-{i}": ("warm" if i % 2 else "", rng.integers(5, 50, 4 + i)) for i in range(4)}
    running = Running(folder, overlap=overlap)
    for rid, (digest, prompt) in wanted.items():
        running.thread.submit(request(rid, digest, 6, prompt))
    running.ends(set(wanted))
    expected = dict(running.ids)

    runner = FullRunner(running.engine, 60, after_forward=after_forward)
    running.engine.runner = runner  # type: ignore[assignment]
    for rid, (digest, prompt) in wanted.items():
        running.thread.submit(request(f"{rid}-again", digest, 6, prompt))
    running.thread.submit(request("large", "", 6, rng.integers(5, 50, 200)))
    ends = running.ends({"large", *(f"{rid}-again" for rid in wanted)})
    running.thread.stop()
    assert runner.num_refused > 0
    error = ends.pop("large").error
    assert isinstance(error, Unavailable)
    assert "out of memory for a step of" in error.message
    assert {end.finish for end in ends.values()} == {"length"}
    assert {rid: running.ids[f"{rid}-again"] for rid in wanted} == expected
    running.engine.check_integrity()
