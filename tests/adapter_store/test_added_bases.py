"""A store while bases are added and removed: to which base an adapter belongs, and to which it never moves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from helpers.adapter_files import BASE as ONE
from helpers.adapter_files import write_adapter

from adapter_store.bases import Bases
from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.sources import FLEET
from adapter_store.sources.local import LocalSource
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, Unavailable

TWO = msgspec.structs.replace(ONE, name="two", model="/models/two", fingerprint="other")
ADDED = m.AddedBases(bases={"two": m.AddedBase(model=TWO.model, added_ms=1)})
REMOVED = m.AddedBases(removed=["two"])


async def test_an_adapter_of_an_added_base_becomes_no_other_s(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters" / "of-two", base_model_name_or_path="two")
    write_adapter(tmp_path / "adapters" / "of-none", base_model_name_or_path="")
    mirror, source = Mirror(Blobs(tmp_path / "blobs"), max_bytes=1 << 20), LocalSource(tmp_path / "adapters")
    bases = Bases([ONE.name])

    async def base_of(name: str, asked: str = "") -> str:
        return (await bases.take(mirror, source, name, asked, FLEET))[1]

    assert bases.set([ONE])
    assert not bases.set([ONE])
    assert [await base_of(name) for name in ("of-two", "of-none")] == ["", ""], "one base takes whatever fits it"
    assert bases.set([ONE], (), ADDED), "all are looked at again"
    assert await base_of("of-none") == ONE.name, "what fits the base that is there waits for none that is added"
    with pytest.raises(Unavailable, match="of the base two, of which no worker has started"):
        await base_of("of-two")
    assert bases.set([ONE, TWO], (), ADDED)
    assert await base_of("of-two") == "two"
    with pytest.raises(AdapterRefused, match="fits several bases"):
        await base_of("of-none")
    assert bases.set([ONE, TWO], (), REMOVED), "its worker drains, and its record is there meanwhile"
    assert await base_of("of-none") == ONE.name
    for name, asked in (("of-two", ""), ("of-none", "two")):
        with pytest.raises(Unavailable, match="of the base two, which was removed"):
            await base_of(name, asked)
    assert bases.get("two") is None
    assert bases.names == [ONE.name]
