"""For each fault, the doctor's finding has the expected level and says what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from lorafleet.operate.checkup import (
    MAX_ANSWER_MS,
    MAX_SKEW_MS,
    Finding,
    Level,
    of_bases,
    of_compiler,
    of_disk,
    of_history,
    of_members,
    of_model,
    of_queue,
    worst,
)
from protocol.queue.connection.server import ServerFacts
from protocol.wire import messages as m

GOOD = ServerFacts("valkey 8.1", "noeviction", 1 << 20, 1 << 30, True, True, "master", 0.3, 2.0)
BEAT = m.WorkerBeat(wid="w1", name="gpu-0", capacity=8, version="1")
STATUS = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0, leader="s:1", version="1")
GiB = 1 << 30


def bad(findings: list[Finding]) -> list[tuple[str, Level]]:
    for finding in findings:
        assert bool(finding.advice) == (finding.level != "ok"), finding
    return [(finding.name, finding.level) for finding in findings if finding.level != "ok"]


def test_a_good_queue_is_said_to_be_good() -> None:
    assert bad(of_queue(GOOD)) == []


@pytest.mark.parametrize(
    ("fault", "name", "level"),
    [
        ({"policy": "allkeys-lru"}, "queue eviction", "problem"),
        ({"appends": False}, "queue persistence", "warning"),
        ({"append_ok": False}, "queue persistence", "problem"),
        ({"snapshot_ok": False}, "queue snapshot", "problem"),
        ({"role": "slave"}, "queue role", "problem"),
        ({"max_bytes": 0}, "queue memory", "warning"),
        ({"used_bytes": (1 << 30) - 1}, "queue memory", "problem"),
        ({"answer_ms": MAX_ANSWER_MS + 1}, "queue", "warning"),
        ({"ahead_ms": MAX_SKEW_MS + 1.0}, "queue clock", "problem"),
        ({"ahead_ms": -60_000.0}, "queue clock", "problem"),
    ],
)
def test_each_fault_of_a_queue_is_named(fault: dict[str, object], name: str, level: Level) -> None:
    assert bad(of_queue(replace(GOOD, **fault))) == [(name, level)]


def test_members_that_lack_or_differ_are_named() -> None:
    versions = {"gateway a": "1", "store b": "1"}
    assert bad(of_members({"w1": BEAT}, STATUS, versions, "1")) == []
    assert bad(of_members({}, STATUS, versions, "1")) == [("workers", "problem")]
    assert bad(of_members({"w1": BEAT}, None, versions, "1")) == [("scheduler", "problem")]
    assert bad(of_members({"w1": BEAT, "w2": None}, STATUS, versions, "1")) == [("lost workers", "warning")]
    draining = m.WorkerBeat(wid="w1", name="gpu-0", capacity=0, draining=True, version="1")
    assert bad(of_members({"w1": draining}, STATUS, versions, "1")) == [("workers", "problem")]
    letters = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0, dead_letters=3, version="1")
    assert bad(of_members({"w1": BEAT}, letters, versions, "1")) == [("dead letters", "warning")]
    assert bad(of_members({"w1": BEAT}, STATUS, {"gateway a": "2"}, "1")) == [("versions", "warning")]
    (silent,) = [one for one in of_members({"w1": BEAT}, STATUS, {"store b": ""}, "1") if one.level != "ok"]
    assert "store b" in silent.text


def test_how_the_base_computes_is_told() -> None:
    base = m.ServedModel(
        model="org/base", name="base", fingerprint="f", model_type="llama", vocab_size=8, max_model_len=8, sites=[],
        dtype="bfloat16", dtype_reason="the native kernels read it", kernels="avx512", device="cpu",
    )  # fmt: skip
    assert of_bases([], {}, {}) == []
    (told,) = of_bases([base], {}, {})
    assert bad([told]) == []
    assert all(part in told.text for part in ("bfloat16", "the native kernels read it", "avx512"))
    (told,) = of_bases([structs.replace(base, draft_model="small")], {}, {})
    assert "small drafts for it" in told.text
    slow = structs.replace(base, dtype="float32", dtype_reason="there are no native kernels", kernels="")
    assert bad(of_bases([slow], {}, {})) == [("base", "warning")]
    assert bad(of_bases([structs.replace(slow, device="cuda")], {}, {})) == []


def test_a_base_without_worker_and_one_that_failed_are_named() -> None:
    one = m.ServedModel(
        model="/models/one", name="one", fingerprint="f", model_type="llama", vocab_size=8, max_model_len=8, sites=[]
    )
    two = structs.replace(one, name="two", model="org/two")
    beats = {"w1": structs.replace(BEAT, base="one")}
    assert bad(of_bases([one], {}, {})) == [], "a fleet of one base has `workers` for that"
    assert bad(of_bases([one, two], {}, beats | {"w2": structs.replace(BEAT, base="two")})) == []
    *_, missing = of_bases([one, two], {}, beats | {"w2": structs.replace(BEAT, base="two", draining=True)})
    assert missing.level == "warning"
    assert "two has no worker" in missing.text
    assert "--model org/two" in missing.advice
    (failed,) = [item for item in of_bases([one, two], {"two": "no memory"}, beats) if item.level != "ok"]
    assert (failed.level, failed.text) == ("problem", "two did not start: no memory")
    assert bad(of_bases([one, two], {}, {"w1": BEAT, "w2": structs.replace(BEAT, base="two")})) == [], "an older worker"


def test_a_disk_that_is_nearly_full_is_a_problem() -> None:
    assert bad([of_disk("disk", "/data", 100 * GiB, 500 * GiB, GiB)]) == []
    assert bad([of_disk("disk", "/data", 20 * GiB, 500 * GiB, GiB)]) == [("disk", "problem")]
    assert bad([of_disk("disk", "/data", GiB, 10 * GiB, 0)]) == [("disk", "problem")]
    refusing = of_disk("disk", "/data", 100 * GiB, 500 * GiB, 101 * GiB)
    assert bad([refusing]) == [("disk", "problem")]
    assert "to keep free: uploads and downloads are refused" in refusing.text


def test_a_model_must_leave_room() -> None:
    assert bad(of_model(4 * GiB, {"memory": 16 * GiB}, workers=1)) == []
    assert bad(of_model(4 * GiB, {"memory": 16 * GiB}, workers=3)) == [("model in memory", "warning")]
    assert bad(of_model(4 * GiB, {"memory": 16 * GiB}, workers=5)) == [("model in memory", "problem")]
    gpus = {"GPU 0": 80 * GiB, "GPU 1": 3 * GiB}
    assert bad(of_model(4 * GiB, gpus, workers=2)) == [("model in GPU 1", "problem")]


def test_a_compiler_is_needed_once() -> None:
    def found(
        machine: str, compiler: str | None, *, is_shipped: bool = False, is_built: bool = False
    ) -> list[tuple[str, Level]]:
        return bad([of_compiler(machine, compiler, is_shipped=is_shipped, is_built=is_built)])

    assert found("x86_64", "/usr/bin/g++") == []
    assert found("aarch64", "/usr/bin/g++") == []
    assert found("x86_64", None, is_built=True) == []
    assert found("x86_64", None, is_shipped=True) == []
    assert found("x86_64", None) == [("compiler", "warning")]
    assert found("riscv64", "/usr/bin/g++") == [("compiler", "warning")]


def test_the_worst_decides() -> None:
    ok, warning, problem = (Finding("x", level, "") for level in ("ok", "warning", "problem"))
    assert [worst([]), worst([ok]), worst([ok, warning]), worst([problem, warning])] == [
        "ok", "ok", "warning", "problem",
    ]  # fmt: skip


def test_a_history_without_its_database_is_a_warning() -> None:
    assert of_history(None) == []
    [found] = of_history("unavailable")
    assert (found.name, found.level) == ("history", "warning")
    assert "calls are served" in found.text
