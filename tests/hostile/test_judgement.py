"""The evaluation of attacks is correct: it accepts an undisturbed victim, and finds each kind of harm."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hostile.arena import CROWD, FLOOR_S, MULTIPLE, Trial, judged
from hostile.memory import growth_bytes
from hostile.victim import Seen

from chaos.attackers.attacker import CLOSED, HUNG, Attack, Attacker
from protocol.runtime.settings import Settings

GAP_S = 0.02
PEACE = Seen(1.0, [GAP_S] * 50, [GAP_S] * 3, num_pieces=53, num_answers=3, num_healthy=9, health_s=[GAP_S] * 9)
GROWTH = growth_bytes(Settings(), CROWD)
RSS = dict.fromkeys(GROWTH, 1 << 20)


def trial(largest: dict[str, int] = RSS, **changes: Any) -> Trial:
    return Trial("a", PEACE, msgspec.structs.replace(PEACE, **changes), {}, RSS, largest, {})


def test_a_victim_in_peace_passes() -> None:
    assert judged(trial(), RSS, GROWTH) == []
    assert judged(trial(gaps_s=[GAP_S] * 50 + [MULTIPLE * FLOOR_S]), RSS, GROWTH) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"errors": ["stream: cut"]}, "cut"),
        ({"num_healthy": 0}, "did not answer"),
        ({"gaps_s": [GAP_S] * 50 + [1.1 * MULTIPLE * FLOOR_S]}, "p99 gap"),
        ({"gaps_s": []}, "p99 gap"),
        ({"ttft_s": [GAP_S, 1.1 * MULTIPLE * FLOOR_S]}, "first token"),
        ({"health_s": [GAP_S, 1.1 * MULTIPLE * FLOOR_S]}, "/health's p99"),
    ],
)
def test_every_harm_to_the_victim_is_found(changes: dict[str, Any], word: str) -> None:
    (found,) = judged(trial(**changes), RSS, GROWTH)
    assert word in found


@pytest.mark.parametrize("member", sorted(GROWTH))
def test_a_member_that_has_grown_too_much_is_found(member: str) -> None:
    most = RSS | {member: RSS[member] + GROWTH[member]}
    assert judged(trial(most), RSS, GROWTH) == []
    (found,) = judged(trial(most | {member: most[member] + (1 << 20)}), RSS, GROWTH)
    assert found.startswith(f"{member} grew")


def test_what_no_attacker_may_be_told_is_found() -> None:
    async def nothing(_: Attacker) -> None:
        pass

    attack = Attack("a", nothing, frozenset({"200"}))
    assert attack.wrongly_told({"200": 1, "400": 5, "429": 1, "503": 2}) == []
    for told in ("500 internal_error", HUNG, CLOSED, "201", "400 without an error in JSON"):
        assert attack.wrongly_told({"200": 1, told: 2}) == [f"the attacker was told 2 times: {told}"]
