"""A folder is reported as settled or removed at the right scan, for any history of scans."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapter_store.sources.local import FolderState, Stamp
from adapter_store.watch import Watch

SETTLE_NS = 10


def state(version: int, changed_ns: int) -> FolderState:
    stamp = Stamp(version, 0, changed_ns, 0)
    return FolderState(stamp, stamp)


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=20))
def test_settles_once_per_content_and_never_while_it_changes(history: list[list[int]]) -> None:
    """Two folders; each number is a version, 0 is absence; every scan sees files written just before it."""
    watch = Watch(SETTLE_NS)
    settled: dict[str, FolderState] = {}
    present: set[str] = set()
    before: list[dict[str, FolderState]] = [{}, {}]
    for at, versions in enumerate(history):
        now_ns = 1000 + at
        seen: dict[str, FolderState] = {}
        for name, version in zip("ab", versions, strict=True):
            if version:
                last = before[-1].get(name) or before[-2].get(name)
                same = last is not None and last.weights is not None and last.weights.num_bytes == version
                seen[name] = last if same and last is not None else state(version, now_ns)
        changes = watch.observe(seen, now_ns)
        for name in "ab":
            unchanged = name in seen and seen[name] in (before[-1].get(name), before[-2].get(name))
            assert (name in changes.settled) == (unchanged and settled.get(name) != seen[name])
            gone = name in present and not any(name in scan for scan in (seen, before[-1]))
            assert (name in changes.removed) == gone
            assert (name in changes.appeared) == (name in seen and name not in present)
        settled |= {name: seen[name] for name in changes.settled}
        present |= seen.keys()
        for name in changes.removed:
            present.discard(name)
            settled.pop(name, None)
        assert {name for name in "ab" if name in watch} == present
        before = [before[-1], seen]


def test_old_content_settles_at_once() -> None:
    watch = Watch(SETTLE_NS)
    changes = watch.observe({"old": state(1, 90), "new": state(1, 95)}, now_ns=100)
    assert changes.settled == ["old"]
    assert changes.appeared == ["old", "new"]


def test_a_failed_one_is_taken_up_again() -> None:
    watch = Watch(SETTLE_NS)
    seen = {"a": state(1, 0)}
    assert watch.observe(seen, 100).settled == ["a"]
    assert watch.observe(seen, 101).settled == []
    watch.recheck("a")
    assert watch.observe(seen, 102).settled == ["a"]
    watch.recheck_all()
    assert watch.observe(seen, 103).settled == ["a"]


def test_names_from_before_are_removed_if_they_are_not_found() -> None:
    watch = Watch(SETTLE_NS, known=["gone", "here"])
    seen = {"here": state(1, 0)}
    assert watch.observe(seen, 100).removed == []
    assert watch.observe(seen, 101).removed == ["gone"]
    assert watch.observe(seen, 102).removed == []
