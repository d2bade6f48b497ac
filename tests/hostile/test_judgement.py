"""The judgement of attacks is worth something: it lets a victim in peace pass, and finds each kind of harm."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hostile.arena import FLOOR_S, GROWTH_BYTES, MULTIPLE, Trial, judged
from hostile.victim import Seen

from chaos.attacker import CLOSED, HUNG, Attack, Attacker

GAP_S = 0.02
PEACE = Seen(1.0, [GAP_S] * 50, num_pieces=50, num_answers=1, num_healthy=9, health_s=[GAP_S] * 9)
RSS = dict.fromkeys(GROWTH_BYTES, 1 << 20)


def trial(largest: dict[str, int] = RSS, **changes: Any) -> Trial:
    return Trial("a", PEACE, msgspec.structs.replace(PEACE, **changes), {}, RSS, largest)


def test_a_victim_in_peace_passes() -> None:
    assert judged(trial(), RSS) == []
    assert judged(trial(gaps_s=[GAP_S] * 50 + [MULTIPLE * FLOOR_S]), RSS) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"errors": ["stream: cut"]}, "cut"),
        ({"num_healthy": 0}, "did not answer"),
        ({"gaps_s": [GAP_S] * 50 + [1.1 * MULTIPLE * FLOOR_S]}, "p99 gap"),
        ({"gaps_s": []}, "p99 gap"),
        ({"health_s": [GAP_S, 1.1 * MULTIPLE * FLOOR_S]}, "/health's p99"),
    ],
)
def test_every_harm_to_the_victim_is_found(changes: dict[str, Any], word: str) -> None:
    (found,) = judged(trial(**changes), RSS)
    assert word in found


@pytest.mark.parametrize("member", sorted(GROWTH_BYTES))
def test_a_member_that_has_grown_too_much_is_found(member: str) -> None:
    most = RSS | {member: RSS[member] + GROWTH_BYTES[member]}
    assert judged(trial(most), RSS) == []
    (found,) = judged(trial(most | {member: most[member] + (1 << 20)}), RSS)
    assert found.startswith(f"{member} grew")


def test_what_no_attacker_may_be_told_is_found() -> None:
    async def nothing(_: Attacker) -> None:
        pass

    attack = Attack("a", nothing, frozenset({"200"}))
    assert attack.wrongly_told({"200": 1, "400": 5, "429": 1, "503": 2}) == []
    for told in ("500 internal_error", HUNG, CLOSED, "201", "400 without an error in JSON"):
        assert attack.wrongly_told({"200": 1, told: 2}) == [f"the attacker was told 2 times: {told}"]
