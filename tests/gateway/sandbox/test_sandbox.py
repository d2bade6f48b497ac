"""Code of clients runs in processes that are shared fairly, are not trusted, and are replaced without side effects."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from helpers import examples, sandbox_stand_in
from helpers.waiting import wait_until

from gateway.grammars.check import GrammarCheck
from gateway.sandbox.child import MAX_ANSWER_BYTES, NOTHING_FITS, READY, Answer, Check, Render, framed
from gateway.sandbox.sandbox import GROW_S, SandboxPool
from gateway.sandbox.turns import MAX_TENANT_BYTES, MAX_TENANT_WAITING
from protocol.wire.errors import BadRequest, Overloaded, Unavailable

NUM = 3
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
STAND_IN = (sys.executable, sandbox_stand_in.__file__)


def job(source: str, **variables: str) -> Render:
    return Render(source, {}, [{"role": "user", "content": "hi"}], True, dict(variables))


@asynccontextmanager
async def running(pool: SandboxPool) -> AsyncIterator[SandboxPool]:
    try:
        yield pool
    finally:
        await pool.close()


def stand_in(first: str = READY.decode(), num: int = NUM, start_s: float = 30.0) -> SandboxPool:
    """Return a pool whose processes do what templates say; `first` defines how they start."""
    return SandboxPool(num, command=(*STAND_IN, first), start_s=start_s)


async def fault(pool: SandboxPool, asked: Render, limit_s: float) -> str:
    """Return the error of a job, retrying while others leave this machine no time to detect it."""

    async def refused() -> str:
        try:
            await pool.do(asked, tenant="a", limit_s=limit_s)
        except Unavailable:
            return ""
        except BadRequest as error:
            return str(error)
        raise AssertionError("it was done")

    return await wait_until(refused, "the machine has time for it")


async def ended(tasks: list[asyncio.Task[str]]) -> list[str | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------- turns of tenants


async def test_a_tenant_with_endless_jobs_leaves_others_a_process() -> None:
    async with running(stand_in()) as pool:
        endless = [asyncio.create_task(pool.render(job("wait"), tenant="a")) for _ in range(10)]
        await wait_until(lambda: len(pool.pids) == NUM - 1, "all that one tenant may have are busy")
        for i in range(5):
            assert await pool.render(job(f"say {i}"), tenant="b") == str(i)
        assert not any(task.done() for task in endless)
        assert len(pool.pids) == NUM
    assert [type(error) for error in await ended(endless)] == [Unavailable] * 10


async def test_ten_slow_grammars_leave_another_tenants_a_process() -> None:
    async with running(stand_in()) as pool:
        check = GrammarCheck(pool, 5.0)
        slow = [asyncio.create_task(check.check(f"wait {i}", "response_format", "a")) for i in range(10)]
        await wait_until(lambda: len(pool.pids) == NUM - 1, "all that one tenant may have are busy")
        for i in range(5):
            await check.check(f"say {i}", "response_format", "b")
        assert not any(task.done() for task in slow)
    assert [type(error) for error in await asyncio.gather(*slow, return_exceptions=True)] == [Unavailable] * 10


async def test_places_are_bounded_by_tenant_and_given_back() -> None:
    waited: list[int] = []
    pool = SandboxPool(NUM, on_wait=lambda: waited.append(1), command=(*STAND_IN, READY.decode()))
    async with running(pool):
        endless = [asyncio.create_task(pool.render(job("wait"), tenant="a")) for _ in range(MAX_TENANT_WAITING)]
        await asyncio.sleep(0)
        assert len(waited) == MAX_TENANT_WAITING
        with pytest.raises(Overloaded, match=f"the limit is {MAX_TENANT_WAITING}"):
            await pool.render(job("say no"), tenant="a")
        endless.pop().cancel()
        await asyncio.sleep(0)
        endless.append(asyncio.create_task(pool.render(job("wait"), tenant="a")))
        assert await pool.render(job("say yes"), tenant="b") == "yes"
        with pytest.raises(BadRequest, match=f"the limit is {MAX_TENANT_BYTES}"):
            await pool.render(job("a" * MAX_TENANT_BYTES), tenant="b")
    assert {type(error) for error in await ended(endless)} == {Unavailable}


# ---------------------------------------------------------------- cancellation


async def test_a_cancelled_job_leaves_nothing_for_the_next_one() -> None:
    """The byte with which a process reports that it is ready was once read as part of the next answer's length."""
    async with running(stand_in()) as pool:
        pids = set[int]()
        for turns in range(40):
            gone = asyncio.create_task(pool.render(job(f"say gone {turns}"), tenant="a"))
            for _ in range(turns):
                await asyncio.sleep(0)
            gone.cancel()
            kept = [pool.render(job(f"say {i}"), tenant="a") for i in range(4)]
            assert await asyncio.gather(*kept) == ["0", "1", "2", "3"]
            with suppress(asyncio.CancelledError):
                await gone
            assert pids <= {*pool.pids}, "no process was ended for what it wrote"
            pids = {*pool.pids}


async def test_a_job_that_is_cancelled_while_its_process_starts_leaves_nothing() -> None:
    async with running(SandboxPool()) as pool:
        render = job("{{ messages[0].content }}")
        gone = asyncio.create_task(pool.render(render, tenant="a"))
        await wait_until(lambda: pool.pids, "the process has begun to start", every_s=0.0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await pool.render(render, tenant="a") == "hi"
        assert len(pool.pids) == 1


# ---------------------------------------------------------------- hostile processes


NO_ANSWERS = [
    b"\xff\xff\xff\xff",
    (MAX_ANSWER_BYTES + 1).to_bytes(4, "little"),
    b"\0\0\0\0",
    (3).to_bytes(4, "little") + b"\xc1\xc1\xc1",
    (2).to_bytes(4, "little") + b"\x91\x01",
    (1000).to_bytes(4, "little") + b"\x91" * 1000,
    framed(Answer("mine")) + framed(Answer("the next one's")),
    framed(Answer("mine")) + b"\0",
    (8).to_bytes(4, "little") + b"\x81\xa4text\xc3\x28",
]


@pytest.mark.parametrize("raw", examples.some(NO_ANSWERS, NO_ANSWERS[0], NO_ANSWERS[3]))
async def test_bytes_that_are_no_answer_end_the_process(raw: bytes) -> None:
    async with running(stand_in(num=2)) as pool:
        await pool.render(job("say hello"), tenant="a")
        (pid,) = pool.pids
        with pytest.raises(BadRequest, match="unreadable answer"):
            await pool.render(job(f"write {raw.hex()}"), tenant="a")
        assert await pool.render(job("say hello"), tenant="b") == "hello"
        assert pid not in pool.pids


@pytest.mark.parametrize("which", examples.some([signal.SIGSEGV, signal.SIGABRT, signal.SIGXCPU], signal.SIGSEGV))
async def test_a_job_that_ends_its_process_is_at_fault(which: signal.Signals) -> None:
    async with running(stand_in(num=2)) as pool:
        with pytest.raises(BadRequest, match=r"ended its process|took longer"):
            await pool.render(job(f"signal {int(which)}"), tenant="a")
        assert await pool.render(job("say hello"), tenant="a") == "hello"


@pytest.mark.parametrize("source", [f"signal {int(signal.SIGKILL)}", "close"])
async def test_a_process_ended_from_outside_says_nothing_of_its_job(source: str) -> None:
    async with running(stand_in(num=2)) as pool:
        with pytest.raises(Unavailable, match="has been ended"):
            await pool.render(job(source), tenant="a")
        assert await pool.render(job("say hello"), tenant="a") == "hello"


async def test_an_idle_process_that_ends_is_replaced() -> None:
    async with running(stand_in(num=2)) as pool:
        for source in ("say hello", "worn hello", "say hello"):
            assert await pool.render(job(source), tenant="a") == "hello"
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not pool.pids, "its end is known")
        assert await pool.render(job("say hello"), tenant="a") == "hello"


async def test_a_job_that_computes_long_gives_way() -> None:
    async with running(stand_in(num=2)) as pool:
        slow = asyncio.create_task(pool.do(job("spin"), tenant="a", limit_s=20.0))
        await wait_until(lambda: pool.pids and os.getpriority(os.PRIO_PROCESS, pool.pids[0]) == 10, "it gives way")
        assert not slow.done()
    with pytest.raises(Unavailable):
        await slow


async def test_a_job_has_its_cpu_time_and_no_more() -> None:
    async with running(stand_in(num=2)) as pool:
        assert "longer than 0.05 s" in await fault(pool, job("spin"), limit_s=0.05)
        with pytest.raises(Unavailable, match="this machine is too busy"):  # it has not computed at all
            await pool.do(job("wait"), tenant="a", limit_s=0.05)


# ---------------------------------------------------------------- processes that do not start


@pytest.mark.parametrize("first", ["dies", "mute", "garbage"])
async def test_callers_are_told_when_no_process_starts(first: str) -> None:
    async with running(stand_in(first, start_s=0.3)) as pool:
        for _ in range(2):  # the second during the pause between starts
            with pytest.raises(Unavailable, match=r"no sandbox process .* could be started") as refused:
                await pool.render(job("say no"), tenant="a")
            assert (refused.value.retry_after_s or 0) >= 1
    async with running(SandboxPool(2, command=("/nowhere/python",))) as pool:
        with pytest.raises(Unavailable, match=r"no sandbox process .* could be started"):
            await pool.render(job("say no"), tenant="a")


async def test_a_process_is_ready_before_the_first_job() -> None:
    async with running(stand_in()) as pool:
        pool.warm_up(0.0)
        await wait_until(lambda: pool.pids, "a process has started")
        pids = pool.pids
        assert await pool.render(job("say hi"), tenant="a") == "hi"
        assert pool.pids == pids


async def test_processes_start_one_at_a_time() -> None:
    """Several jobs at once usually cost one start: the first process does them all in a few milliseconds."""
    async with running(stand_in("mute")) as pool:
        waiting = [asyncio.create_task(pool.render(job("say no"), tenant=tenant)) for tenant in "abc"]
        await wait_until(lambda: pool.pids, "a process is starting")
        await asyncio.sleep(2 * GROW_S)
        assert len(pool.pids) == 1
    assert [type(error) for error in await ended(waiting)] == [Unavailable] * 3


async def test_a_closed_pool_refuses() -> None:
    pool = stand_in()
    starting = asyncio.create_task(pool.render(job("say no"), tenant="a"))
    await asyncio.sleep(0)
    await pool.close()
    assert pool.pids == []
    for refused in (starting, pool.render(job("say no"), tenant="a")):
        with pytest.raises(Unavailable, match="shutting down"):
            await refused


# ---------------------------------------------------------------- the real process


async def test_templates_and_grammars_fail_alone(model_folder: Path) -> None:
    async with running(SandboxPool(tokenizer=str(model_folder / "tokenizer.json"))) as pool:
        assert "longer than 0.1 s" in await fault(pool, job(ENDLESS), limit_s=0.1)
        for source, said in (
            ("{{ 'a' * 3000000000 }}", "wants more than"),
            ("{{ 'ab' * 9000000 }}", "the limit is"),
            ("{{ '\\ud800' }}", "surrogates not allowed"),
            ("{% if %}", "chat template is broken"),
            ("{{ raise_exception('no') }}", "refuses these messages: no"),
            ("{{ messages.__class__.__mro__ }}", "refuses these messages"),
        ):
            with pytest.raises(BadRequest, match=said):
                await pool.render(job(source), tenant="a")
        assert await pool.render(job("{{ messages[0].content }}!"), tenant="a") == "hi!"
        for loop in ({"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}):
            grammar = json.dumps({"grammars": [{"json_schema": loop}]})
            assert (await pool.do(Check(grammar), tenant="a")).refusal == NOTHING_FITS
        with pytest.raises(BadRequest, match="cannot be given these values"):
            await pool.render(Render("", {}, [{"content": 1 << 70}], True, {}), tenant="a")


async def test_what_templates_may_use_is_there() -> None:
    """Modules that Python imports late and the time zone are loaded before the process loses access to files."""
    source = (
        "{{ strftime_now('%z') }}|{{ '<b>x</b> &lt;'|striptags }}"
        "|{{ 'a b'|wordwrap(1) }}|{{ [1]|pprint }}|{{ [1]|random }}|{{ lipsum(1)|length > 9 }}"
        "|{{ '\\N{BULLET}' }}|{{ {'a': 1}|tojson(indent=1) }}|{{ 'http://a.b c'|urlize }}"
    )
    async with running(SandboxPool()) as pool:
        zone, plain, *rest = (await pool.render(job(source), tenant="a")).split("|")
        assert zone == ""  # a naive time has none
        assert plain == "x <"
        assert rest[:3] == ["a\nb", "[1]", "1"]
        assert rest[4:6] == ["•", '{\n "a": 1\n}']


async def test_a_process_has_no_environment_and_no_rights(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    secrets = {"REDIS_URL": "redis://x", "LORAFLEET_SECRET": "s", "HF_TOKEN": "hf", "AWS_SECRET_ACCESS_KEY": "k"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    async with running(SandboxPool(tokenizer=str(model_folder / "tokenizer.json"))) as pool:
        await pool.do(Check('{"grammars":[{"lark_grammar":"start: /a/"}]}'), tenant="a")
        (pid,) = pool.pids
        proc = Path(f"/proc/{pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
        assert (proc / "oom_score_adj").read_text() == "1000\n"
        limits = (proc / "limits").read_text()
        for limit in ("Max file size             0 ", "Max processes             0 ", "Max core file size        0 "):
            assert limit in limits
        with suppress(PermissionError):  # only root can read these of a process that can't be dumped
            names = {pair.partition("=")[0] for pair in (proc / "environ").read_text().split("\0") if pair}
            assert names <= {
                "PYTHONPATH", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "OPENBLAS_NUM_THREADS",
                "MALLOC_ARENA_MAX", "TZ",
            }  # fmt: skip
            assert len(list((proc / "fd").iterdir())) <= 6


@pytest.mark.parametrize("had_grammars", [False, True])
async def test_a_vocabulary_is_read_before_the_first_job(
    had_grammars: bool, model_folder: Path, tmp_path: Path
) -> None:
    """Only after the first grammar, as templates don't need the vocabulary."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((model_folder / "tokenizer.json").read_bytes())
    grammar = Check('{"grammars":[{"lark_grammar":"start: /a/"}]}')
    async with running(SandboxPool(2, tokenizer=str(tokenizer))) as pool:
        if had_grammars:
            assert not (await pool.do(grammar, tenant="a")).refusal
            os.kill(pool.pids[0], signal.SIGKILL)
            await wait_until(lambda: not pool.pids, "its end is known")
        assert await pool.render(job("{{ messages[0].content }}"), tenant="a") == "hi"
        tokenizer.write_text("no tokenizer any more")
        assert bool((await pool.do(grammar, tenant="a")).refusal) != had_grammars
