"""Adapters with their own tokens and chat template: from every source, part of the digest, never lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.adapter_files import BASE as PLAIN_BASE
from helpers.adapter_files import adapter_bytes, write_adapter
from helpers.hub_stub import Repo, run_hub
from helpers.reported import report
from helpers.s3_server import BUCKET, run_s3
from helpers.store_run import QUICK, RunStore, ask, get, in_state
from helpers.waiting import wait_until
from msgspec import structs

from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.shared_bucket import SharedBucket
from adapter_store.sources.hub import HubSource
from adapter_store.sources.s3 import S3Source
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.texts.files import (
    MAX_CONFIG_BYTES,
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    TEXTS_FIELD,
    TEXTS_FILE,
    OwnTexts,
    parse_texts,
    read_texts,
)
from peft_adapters.texts.tokenizer_json import AddedToken, parts_of
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import Registration

FILE: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"ä": 0, "b": 1, "äb": 2}, "merges": [["ä", "b"]]},
    "added_tokens": [{"id": 3, "content": "<new>", "special": True, "normalized": False}],
}
TOKENIZER = json.dumps(FILE, ensure_ascii=False).encode()
BASE = structs.replace(PLAIN_BASE, tokenizer=parts_of(json.dumps({**FILE, "added_tokens": []})))
NEW = AddedToken(3, "<new>", special=True, normalized=False)
TEXTS = {"tokenizer.json": TOKENIZER, "chat_template.jinja": b"{{ messages }}"}
ADAPTER = {
    **adapter_bytes(),
    "tokenizer_config.json": b'{"eos_token": "<end>"}',
    **TEXTS,
}


def config(**fields: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(fields).encode()}


def texts_of(blobs: Blobs, digest: str) -> OwnTexts:
    files = blobs.open(digest)
    assert files is not None
    assert files.texts is not None
    return files.texts


def write_texts(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)


async def test_texts_are_served_and_part_of_the_digest(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_adapter(root / "plain", seed=1)
    # The config's own field for texts is ignored.
    own = write_adapter(root / "own", seed=1, lorafleet_texts="ab")
    url = await run_store().url()
    plain, alone = await in_state(bus, "plain", "on_disk"), await in_state(bus, "own", "on_disk")
    assert alone.digest == plain.digest
    write_texts(own, chat_template__jinja="{{ 1 }}", tokenizer_config__json='{"bos_token": {"content": "<s>"}}')
    first = await in_state(bus, "own", "on_disk", not_digest=plain.digest)
    config, _ = await ask(url, first.digest)
    answer = await get(f"{url}/adapters/{first.digest}/{TEXTS_FILE}")
    missing = await get(f"{url}/adapters/{plain.digest}/{TEXTS_FILE}")
    assert hashlib.sha256(answer.content).hexdigest() == config[TEXTS_FIELD]
    texts = parse_texts(answer.content, config[TEXTS_FIELD])
    assert texts == OwnTexts("{{ 1 }}", {"bos_token": "<s>"})
    assert missing.status_code == 404
    write_texts(own, chat_template__jinja="{{ 2 }}")
    second = await in_state(bus, "own", "on_disk", not_digest=first.digest)
    assert second.digest != plain.digest


async def test_damaged_texts_are_fetched_again(bus: Bus, settings: Settings, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_texts(write_adapter(root / "own"), chat_template__jinja="{{ 1 }}")
    store = run_store()
    digest = (await in_state(bus, "own", "on_disk")).digest
    await store.end()
    kept = settings.data / "adapters" / "blobs" / digest / TEXTS_FILE
    good = kept.read_bytes()
    kept.write_bytes(good.replace(b"1", b"2"))
    url = await run_store().url()
    assert (await get(f"{url}/adapters/{digest}/{TEXTS_FILE}")).content == good


async def test_a_text_that_is_none_refuses_the_adapter(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_texts(write_adapter(root / "bad"), tokenizer__json="{")
    run_store()
    assert "tokenizer.json cannot be read" in (await in_state(bus, "bad", "failed")).reason


OTHER = json.dumps({**FILE, "model": {**FILE["model"], "merges": []}})
DIFFERS = "tokenizer.json differs from the base model's in its merges; only added tokens are served: remove the file"


async def test_another_tokenizer_than_the_base_s_is_refused(
    bus: Bus, root: Path, run_store: RunStore
) -> None:  # fmt: skip
    """A copy of the base's tokenizer is served, in any serialization, and so is one with added tokens."""
    await report(bus, BASE)
    older = {**FILE, "model": {"vocab": FILE["model"]["vocab"], "merges": ["ä b"], "ignore_merges": False}}
    texts = {"copy": json.dumps({**older, "added_tokens": []}), "more": json.dumps(older), "other": OTHER}
    for name, text in texts.items():
        write_texts(write_adapter(root / name), tokenizer__json=text)
    run_store()
    other = await in_state(bus, "other", "failed")
    assert (other.status, DIFFERS in other.reason) == (422, True), other.reason
    digests = {(await in_state(bus, name, "on_disk")).digest for name in ("copy", "more")}
    assert len(digests) == 2
    await report(bus, structs.replace(BASE, tokenizer=parts_of(OTHER)))  # same weights
    assert DIFFERS in (await in_state(bus, "copy", "failed")).reason
    assert (await in_state(bus, "other", "on_disk")).digest


async def test_a_name_is_not_registered_for_another_tokenizer(bus: Bus, run_store: RunStore) -> None:
    async with run_hub() as hub:
        hub.repos["org/own"] = Repo()
        hub.repos["org/own"].commit({**ADAPTER, "tokenizer.json": OTHER.encode()})
        await report(bus, BASE)
        run_store(hub_endpoint=hub.url)
        await bus.adapters.register(Registration(name="own", tenant="", source="hub:org/own", asked_ms=now_ms()))
        alias = await in_state(bus, "own", "failed")
        assert (alias.status, DIFFERS in alias.reason) == (422, True), alias.reason


async def test_texts_that_an_older_store_kept_are_fetched_again(
    bus: Bus, settings: Settings, root: Path, run_store: RunStore
) -> None:  # fmt: skip
    await report(bus, BASE)
    write_texts(write_adapter(root / "own"), chat_template__jinja="{{ 1 }}")
    store = run_store()
    digest = (await in_state(bus, "own", "on_disk")).digest
    await store.end()
    kept = settings.data / "adapters" / "blobs" / digest
    older = json.dumps({"chat_template.jinja": "{{ 1 }}"}).encode()
    (kept / TEXTS_FILE).write_bytes(older)
    config = json.loads((kept / CONFIG_FILE).read_bytes()) | {TEXTS_FIELD: hashlib.sha256(older).hexdigest()}
    (kept / CONFIG_FILE).write_text(json.dumps(config))
    run_store()
    await wait_until(lambda: kept.exists() and (kept / TEXTS_FILE).read_bytes() != older, "it is fetched again")
    assert (await in_state(bus, "own", "on_disk")).digest == digest


async def test_from_the_hub(tmp_path: Path) -> None:
    async with run_hub() as hub:
        repo = hub.repos["org/own"] = Repo()
        repo.commit({**ADAPTER, "README.md": b"hello", "vocab.txt": b"a"})
        source, blobs = HubSource(hub.url, retries=QUICK), Blobs(tmp_path)
        taken = await Mirror(blobs, max_bytes=1 << 20).take(source, "org/own", BASE)
        await source.close()
    texts = texts_of(blobs, taken.digest)
    assert (texts.template, texts.special_tokens) == ("{{ messages }}", {"eos_token": "<end>"})
    assert texts.tokenizer is not None
    assert (texts.tokenizer.parts, texts.tokenizer.added) == (BASE.tokenizer, [NEW])
    assert blobs.verified(taken.digest)
    assert sorted(path.name for path in (tmp_path / "blobs" / taken.digest).iterdir()) == [
        CONFIG_FILE, WEIGHTS_FILE, TEXTS_FILE,
    ]  # fmt: skip


async def test_from_s3_and_through_the_shared_bucket(tmp_path: Path) -> None:
    with run_s3() as server:
        client = server.client()
        for name, content in ADAPTER.items():
            client.put_object(Bucket=BUCKET, Key=f"own/{name}", Body=content)
        bucket = SharedBucket(client, f"s3://{BUCKET}/shared")
        source = S3Source(client, retries=QUICK)
        first, second = Blobs(tmp_path / "one"), Blobs(tmp_path / "two")
        taken = await Mirror(first, max_bytes=1 << 20, shared_bucket=bucket).take(source, f"//{BUCKET}/own", BASE)
        client.delete_object(Bucket=BUCKET, Key=f"own/{WEIGHTS_FILE}")
        assert await Mirror(second, max_bytes=1 << 20, shared_bucket=bucket).restore(taken.digest)
        assert texts_of(second, taken.digest) == texts_of(first, taken.digest)
        bucket.drop(taken.digest)
        assert not await Mirror(Blobs(tmp_path / "three"), max_bytes=1 << 20, shared_bucket=bucket).restore(
            taken.digest
        )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": b"[]"}, "tokenizer.json cannot be read"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja cannot be read"),
        ({"tokenizer.json": b" " * (MAX_TOKENIZER_BYTES + 1)}, f"the limit is {MAX_TOKENIZER_BYTES}"),
        ({"chat_template.jinja": b"x" * (MAX_TEMPLATE_BYTES + 1)}, f"the limit is {MAX_TEMPLATE_BYTES}"),
        ({"tokenizer_config.json": b" " * (MAX_CONFIG_BYTES + 1)}, f"the limit is {MAX_CONFIG_BYTES}"),
        (config(chat_template="x" * (MAX_TEMPLATE_BYTES + 1)), f"the limit is {MAX_TEMPLATE_BYTES}"),
        (config(chat_template=[{"name": str(i), "template": "t"} for i in range(65)]), "has 65 templates"),
        (config(eos_token="x" * 1025), "eos_token has 1025 characters"),
        (config(eos_token={"content": "x" * 1025}), "eos_token has 1025 characters"),
        ({"special_tokens_map.json": json.dumps({f"{i}_token": "t" for i in range(65)}).encode()}, "has 65 tokens"),
        ({"special_tokens_map.json": b'{"a": ' * 10_000}, "special_tokens_map.json cannot be read"),
        ({"tokenizer_config.json": b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"}, "nested too deeply"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}'}, "4|Expected"),
    ],
)
def test_what_is_no_text_is_refused(files: dict[str, bytes], said: str) -> None:
    with pytest.raises(AdapterRefused, match=said):
        read_texts(files)


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({"chat_template": "t"}, "t"),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, None),
        ({"model_max_length": 8}, None),
    ],
)
def test_only_a_tokenizer_or_a_template_counts(config: dict[str, Any], template: str | None) -> None:
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    texts = read_texts(files)
    assert (texts.template if texts is not None else None) == template


def test_another_hash_is_noticed() -> None:
    with pytest.raises(AdapterRefused, match="another hash"):
        parse_texts(b"{}", "0" * 64)
