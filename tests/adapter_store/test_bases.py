"""The base of an adapter: the one of its registration, else the one that it names, else the only one that it fits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapter_store.bases import Bases
from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror, Mirrored
from adapter_store.sources import FLEET, Source, SourceVersion
from protocol.wire.errors import AdapterRefused, BadRequest, LorafleetError, Unavailable
from protocol.wire.messages import AdapterRecord, ServedModel

NAMES = ("one", "two", "org/Three-7B")


def base(name: str, **more: Any) -> ServedModel:
    facts = {"model": f"/models/{name}", "fingerprint": name, "model_type": "t", "vocab_size": 1} | more
    return ServedModel(name=name, max_model_len=1, sites=[], **facts)


class FakeMirror:
    """Has one adapter, which names the base `named` and fits the bases `fits`."""

    def __init__(self, named: str = "", fits: tuple[str, ...] = ()) -> None:
        self.named, self.fits = named, fits
        self.checked: list[str] = []

    async def take(self, *_: object) -> Mirrored:
        return Mirrored("d", cast("SourceVersion", _Version))

    @property
    def blobs(self) -> Any:
        return SimpleNamespace(named_base=lambda _: self.named)

    async def describe(self, digest: str, source: str, base: ServedModel) -> AdapterRecord:
        self.checked.append(base.name)
        if base.name not in self.fits:
            raise AdapterRefused([f"no such layer in {base.name}"])
        return AdapterRecord(digest=digest, rank=1, num_bytes=1, config={}, modules=[], source=base.name, created_ms=1)


class _Version:
    source, key = "local:x", "x"


async def chosen(bases: Bases, mirror: FakeMirror, asked: str = "") -> str:
    _, name, record = await bases.take(cast("Mirror", mirror), cast("Source", None), "x", asked, FLEET)
    assert record is not None
    assert record.source == (name or "one")
    return name


def several(*names: str) -> Bases:
    bases = Bases(NAMES)
    bases.set([base(name) for name in names or NAMES])
    return bases


@pytest.mark.parametrize(
    ("asked", "named", "fits", "found"),
    [
        ("two", "one", ("one", "two"), "two"),
        ("", "one", ("one", "two"), "one"),
        ("", "/models/two", ("one", "two"), "two"),
        ("", "/elsewhere/TWO/", ("one", "two"), "two"),
        ("", "org/Three-7B", NAMES, "org/Three-7B"),
        ("", "mirror/three-7b", NAMES, "org/Three-7B"),
        ("", "org/model-that-one-was-trained-from", ("one",), "one"),
        ("", "", ("two",), "two"),
    ],
)
async def test_what_is_said_first_decides(asked: str, named: str, fits: tuple[str, ...], found: str) -> None:
    assert await chosen(several(), FakeMirror(named, fits), asked) == found


@pytest.mark.parametrize(
    ("asked", "named", "fits", "error", "text"),
    [
        ("four", "one", NAMES, BadRequest, "no base 'four'; it has one, two, org/Three-7B"),
        (
            "two",
            "",
            ("one",),
            AdapterRefused,
            "registered for the base two, which it does not fit: no",
        ),
        ("", "two", ("one",), AdapterRefused, "base_model_name_or_path says the base two, which it does not fit"),
        ("", "", ("one", "two"), AdapterRefused, r"fits several bases of this fleet \(one, two\) and names none"),
        ("", "unknown", (), AdapterRefused, "fits no base of this fleet; one: no such layer in one; two: no such"),
    ],
)
async def test_what_is_contradicted_or_open_is_refused_with_the_candidates(
    asked: str, named: str, fits: tuple[str, ...], error: type[LorafleetError], text: str
) -> None:
    with pytest.raises(error, match=text):
        await chosen(several(), FakeMirror(named, fits), asked)


async def test_nothing_is_guessed_while_a_base_is_still_starting() -> None:
    bases = several("one", "org/Three-7B")
    assert await chosen(bases, FakeMirror("one", ("one",))) == "one"
    with pytest.raises(Unavailable, match="an adapter of the base two, of which no worker has started yet"):
        await chosen(bases, FakeMirror("two", ("two",)))
    with pytest.raises(Unavailable, match="may fit two, of which no worker has started yet"):
        await chosen(bases, FakeMirror("", ("one",)))
    assert bases.set([base("one"), base("org/Three-7B")], ["two", "stranger"])
    assert await chosen(bases, FakeMirror("", ("one",))) == "one"  # a base that failed to start delays no adapter
    assert bases.set([base(name) for name in NAMES], ["two"])
    with pytest.raises(AdapterRefused, match="several bases"):
        await chosen(bases, FakeMirror("", ("one", "two")))


async def test_bases_that_the_fleet_was_not_given_are_no_candidates() -> None:
    bases = Bases(NAMES)
    bases.set([base("stranger"), *(base(name) for name in NAMES)])
    mirror = FakeMirror("stranger", ("stranger", "two"))
    assert await chosen(bases, mirror) == "two"
    assert set(mirror.checked) == set(NAMES)


@pytest.mark.parametrize("names", [(), ("one",), ("another name",)])
async def test_a_fleet_of_one_base_takes_what_fits_it_whatever_it_names(names: tuple[str, ...]) -> None:
    bases = Bases(names)
    assert bases.set([base("one"), base("two")])
    assert not bases.set([base("one"), base("two")])
    for named in ("", "two", "unknown"):
        assert await chosen(bases, FakeMirror(named, ("one", "two"))) == ""
    assert await chosen(bases, FakeMirror("", ("one",)), asked="one") == ""
    with pytest.raises(BadRequest, match="this fleet has no base 'two'; it has one"):
        await chosen(bases, FakeMirror("", ("one",)), asked="two")


def test_what_a_fleet_of_one_base_published_is_of_an_unknown_one() -> None:
    """Its catalogue names no base: another base could serve the adapters that it keeps while their source is down."""
    one = Bases(["one"])
    one.set([base("one")])
    assert one.get("") == base("one")
    assert several().get("") is None


async def test_its_own_base_is_meant_where_a_stranger_was_first() -> None:
    bases = Bases(["one"])
    bases.set([base("stranger"), base("one")])
    assert bases.names == ["one"]


def test_a_change_of_any_base_is_one() -> None:
    bases = several()
    assert not bases.set([base(name) for name in reversed(NAMES)])
    assert bases.set([base("one"), base("two", fingerprint="other"), base("org/Three-7B")])
    assert not bases.set([])  # an empty queue, after a flush: known bases are kept
    assert bases.names == list(NAMES)


def test_what_a_version_names_is_kept_beside_its_readers(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    assert blobs.named_base("v") == ""
    blobs.note_version("v", "d")
    blobs.note_reader("v", "anyone")
    for name in ("one", "", "base two"):
        blobs.note_version("v", "d", name)
        assert (blobs.named_base("v"), blobs.readers_of("v")) == (name, {"anyone"})
    blobs.note_reader("v", "fleet")
    assert (blobs.named_base("v"), blobs.readers_of("v")) == ("base two", {"anyone", "fleet"})
    blobs.note_version("v", "other")  # the content of a folder, unlike that of a commit, can change
    assert (blobs.named_base("v"), blobs.readers_of("v")) == ("", set())
