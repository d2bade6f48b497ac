"""Fields of a request that not every worker knows: those added since workers report what they know."""

from __future__ import annotations

from protocol.wire import messages as m
from protocol.wire.messages.requests import EVERY_WORKER_KNOWS, KNOWN_FIELDS, fields_in_use


class LaterSampling(m.Sampling, frozen=True):
    """A version with an additional field of each kind."""

    draw: int = 3
    forbidden: tuple[int, ...] = ()


def test_a_field_counts_as_new_by_itself_and_only_if_used() -> None:
    assert fields_in_use(LaterSampling(temperature=0.0, watermark=True)) == []
    assert fields_in_use(LaterSampling(draw=3, forbidden=())) == []
    assert fields_in_use(LaterSampling(draw=4)) == ["draw"]
    assert fields_in_use(LaterSampling(draw=4, forbidden=(1,))) == ["draw", "forbidden"]


def test_a_worker_knows_all_fields_of_its_version() -> None:
    fields = {*m.Sampling.__struct_fields__, *m.Body.__struct_fields__}
    assert fields >= EVERY_WORKER_KNOWS
    assert set(KNOWN_FIELDS) == (fields - EVERY_WORKER_KNOWS) | {"score"}


def test_a_text_is_scored_by_workers_that_know_the_task() -> None:
    def needs(task: m.Task) -> list[str]:
        return fields_in_use(m.Body(prompt=b"", sampling=m.Sampling(), max_new_tokens=0, task=task))

    assert needs("score") == ["score"]
    assert not any(map(needs, ("generate", "embed", "classify")))
