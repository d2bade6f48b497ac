"""Results of grammar checks are remembered for the time and the tenants for which they hold."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from helpers.clocks import SetClock
from helpers.waiting import wait_until

from gateway.grammars.check import LIMIT_REMEMBERED_S, GrammarCheck
from gateway.sandbox.child import Answer, Check, SandboxJob
from gateway.sandbox.sandbox import SandboxPool
from protocol.wire.errors import BadRequest, LorafleetError, Overloaded, Unavailable


@dataclass
class Script(SandboxPool):
    """A sandbox with a scripted outcome."""

    outcome: str | LorafleetError = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # tenants and grammars
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    num_waited: int = 0

    def __post_init__(self) -> None:
        self.gate.set()
        self.on_wait = self.waits

    def waits(self) -> None:
        self.num_waited += 1

    async def do(self, job: SandboxJob, *, tenant: str, limit_s: float | None = None) -> Answer:
        assert isinstance(job, Check)
        self.asked.append((tenant, job.grammar))
        await self.gate.wait()
        if isinstance(self.outcome, LorafleetError):
            raise self.outcome
        return Answer(refusal=self.outcome)


@pytest.fixture
def sandbox() -> Script:
    return Script()


async def refused(check: GrammarCheck, tenant: str, match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        await check.check("g", "response_format", tenant)


async def test_what_the_compiler_says_holds_for_everybody(sandbox: Script) -> None:
    clock = SetClock()
    check = GrammarCheck(sandbox, 5.0, clock)
    sandbox.outcome = "no such rule"
    for tenant in "aab":
        await refused(check, tenant, "response_format cannot be served: no such rule")
    clock.now_s = 10 * LIMIT_REMEMBERED_S
    await refused(check, "b", "no such rule")
    sandbox.outcome = ""
    for tenant in "ab":
        await check.check("h", "response_format", tenant)
    assert sandbox.asked == [("a", "g"), ("a", "h")]


async def test_what_took_too_much_holds_for_its_tenant_and_a_minute(sandbox: Script) -> None:
    clock = SetClock()
    check = GrammarCheck(sandbox, 5.0, clock)
    sandbox.outcome = BadRequest("took longer than 5 s")
    for _ in range(2):
        await refused(check, "a", "took longer")
    sandbox.outcome = ""
    await check.check("i", "response_format", "a")
    await refused(check, "a", "took longer")
    clock.now_s = LIMIT_REMEMBERED_S
    await check.check("g", "response_format", "a")
    assert [asked for asked in sandbox.asked if asked[1] == "g"] == [("a", "g")] * 2


async def test_another_tenant_has_a_try_of_its_own(sandbox: Script) -> None:
    check = GrammarCheck(sandbox, 5.0)
    sandbox.outcome = BadRequest("took longer than 5 s")
    await refused(check, "a", "took longer")
    sandbox.outcome = ""
    await check.check("g", "response_format", "b")
    await check.check("g", "response_format", "a")  # by now it is known to compile


@pytest.mark.parametrize("error", [Unavailable("busy"), Overloaded("full", 1.0)])
async def test_what_could_not_be_tried_is_not_remembered(sandbox: Script, error: LorafleetError) -> None:
    check = GrammarCheck(sandbox, 5.0)
    sandbox.outcome = error
    with pytest.raises(type(error)):
        await check.check("g", "response_format", "a")
    sandbox.outcome = ""
    await check.check("g", "response_format", "a")
    assert len(sandbox.asked) == 2


@pytest.mark.parametrize("outcome", ["", "no such rule", Unavailable("busy")])
async def test_who_asks_for_the_same_waits_for_the_same(sandbox: Script, outcome: str | LorafleetError) -> None:
    check = GrammarCheck(sandbox, 5.0)
    sandbox.outcome = outcome
    sandbox.gate.clear()
    same = [asyncio.create_task(check.check("g", "response_format", "a")) for _ in range(5)]
    other = asyncio.create_task(check.check("g", "response_format", "b"))
    await wait_until(lambda: len(sandbox.asked) == 2, "one of each tenant asks")
    sandbox.gate.set()
    results = await asyncio.gather(*same, other, return_exceptions=True)
    assert len({str(result) for result in results}) == 1
    assert sandbox.num_waited == 4, "whoever waits for another is not on the way to the queue"
    assert len(sandbox.asked) == 2


async def test_a_caller_that_leaves_takes_nobody_along(sandbox: Script) -> None:
    check = GrammarCheck(sandbox, 5.0)
    sandbox.gate.clear()
    first, second = (asyncio.create_task(check.check("g", "response_format", "a")) for _ in range(2))
    await wait_until(lambda: sandbox.asked, "the first asks")
    first.cancel()
    sandbox.gate.set()
    await second
    assert first.cancelled()
    assert len(sandbox.asked) == 2
