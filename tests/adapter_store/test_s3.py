"""S3 as a source and as a bucket shared by stores, against a real server that checks credentials."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from botocore.exceptions import ClientError, NoCredentialsError
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors, write_adapter
from helpers.other_formats import peft_pairs, write_gguf, write_mlx
from helpers.reported import report
from helpers.s3_server import BUCKET, S3Server, run_cutter, run_s3
from helpers.store_run import QUICK, RunStore, ask, in_state
from safetensors.numpy import load_file

from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.shared_bucket import SharedBucket
from adapter_store.sources import Changed, RemoteFile, SourceAccess, SourceVersion
from adapter_store.sources.local import LocalSource
from adapter_store.sources.s3 import S3Source
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, BadRequest, NotFound, PermissionDenied, Unavailable

WIDE = [m.SiteShape(site.name, 20_000, 16) for site in BASE.sites]  # raises the weights to 1.3 MB


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with run_s3() as server:
        yield server


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(Blobs(tmp_path / "blobs"), max_bytes=64 << 20)


@pytest.fixture
def source(s3: S3Server) -> S3Source:
    return S3Source(s3.client(), retries=QUICK)


def upload(s3: S3Server, prefix: str, weights: bytes | None = None, **fields: Any) -> None:
    client = s3.client()
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{CONFIG_FILE}", Body=json.dumps(lora_config(**fields)).encode())
    if weights is not None:
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{WEIGHTS_FILE}", Body=weights)


def weights(seed: int = 0) -> bytes:
    return safetensors(lora_tensors(seed))


async def test_takes_and_refreshes(s3: S3Server, source: S3Source, mirror: Mirror) -> None:
    """The ETags identify the version: unchanged objects are not downloaded again, changed ones are new content."""
    upload(s3, "team/a", weights())
    first = await mirror.take(source, f"//{BUCKET}/team/a", BASE)
    assert first.version.source == f"s3://{BUCKET}/team/a"
    assert await mirror.take(source, f"//{BUCKET}/team/a/", BASE) == first
    upload(s3, "team/a", weights(1))
    second = await mirror.take(source, f"//{BUCKET}/team/a", BASE)
    assert second.digest != first.digest
    upload(s3, "team/a", weights(1), lora_alpha=99)
    assert (await mirror.take(source, f"//{BUCKET}/team/a", BASE)).digest not in (first.digest, second.digest)


async def test_one_of_mlx_is_taken(s3: S3Server, source: S3Source, mirror: Mirror, tmp_path: Path) -> None:
    peft = write_adapter(tmp_path / "peft")
    for path in write_mlx(peft, tmp_path / "mlx", scale=2.0).iterdir():
        s3.client().put_object(Bucket=BUCKET, Key=f"team/mlx/{path.name}", Body=path.read_bytes())
    taken = await mirror.take(source, f"//{BUCKET}/team/mlx", BASE)
    folder = mirror.blobs.verified(taken.digest)
    assert folder is not None
    found, expected = load_file(folder / WEIGHTS_FILE), load_file(peft / WEIGHTS_FILE)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def upload_gguf(s3: S3Server, prefix: str, folder: Path, seed: int = 0) -> Path:
    """Make a PEFT adapter in a folder and upload llama.cpp's form of it; return the PEFT folder."""
    peft = write_adapter(folder / "peft", seed=seed)
    path = write_gguf(peft_pairs(peft), folder / "any-name.gguf", "llama", 8.0, heads=(2, 2))
    s3.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    return peft


async def test_one_in_gguf_is_taken(s3: S3Server, source: S3Source, mirror: Mirror, tmp_path: Path) -> None:
    peft, base = upload_gguf(s3, "team/cpp", tmp_path), msgspec.structs.replace(BASE, head_dim=8)
    s3.client().put_object(Bucket=BUCKET, Key="team/cpp/older/other.gguf", Body=b"GGUF")  # deeper: another adapter's
    taken = await mirror.take(source, f"//{BUCKET}/team/cpp", base)
    folder = mirror.blobs.verified(taken.digest)
    assert folder is not None
    found, expected = load_file(folder / WEIGHTS_FILE), load_file(peft / WEIGHTS_FILE)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    upload_gguf(s3, "team/cpp", tmp_path / "2", seed=1)
    assert (await mirror.take(source, f"//{BUCKET}/team/cpp", base)).digest != taken.digest


async def test_two_in_gguf_are_refused(s3: S3Server, source: S3Source) -> None:
    for name in ("a", "b"):
        s3.client().put_object(Bucket=BUCKET, Key=f"two/{name}.gguf", Body=b"GGUF")
    with pytest.raises(AdapterRefused, match="2 GGUF files"):
        await source.resolve(f"//{BUCKET}/two")


class Crowded:
    """An S3 client with a prefix of more objects than are listed, none of them an adapter's config."""

    meta = SimpleNamespace(endpoint_url="http://s3")

    def head_object(self, **_: Any) -> Any:
        raise ClientError({"ResponseMetadata": {"HTTPStatusCode": 404}}, "HeadObject")

    def list_objects_v2(self, **asked: Any) -> dict[str, Any]:
        return {"Contents": [{"Key": f"a/{i}"} for i in range(asked["MaxKeys"])], "IsTruncated": True}


async def test_a_crowded_prefix_is_not_read_through() -> None:
    with pytest.raises(AdapterRefused, match="more than 1000 objects"):
        await S3Source(Crowded()).resolve("//bucket/a")


async def test_an_object_replaced_meanwhile_is_noticed(s3: S3Server, source: S3Source, tmp_path: Path) -> None:
    upload(s3, "swap", weights())
    version = await source.resolve(f"//{BUCKET}/swap")
    await source.fetch(version, WEIGHTS_FILE, tmp_path / "w", 100)
    upload(s3, "swap", weights(1))
    with pytest.raises(Changed):
        await source.fetch(version, WEIGHTS_FILE, tmp_path / "w", version.files[WEIGHTS_FILE].num_bytes)
    assert (tmp_path / "w").read_bytes() == weights()[:100]


async def test_tenants_get_nothing_with_the_fleets_credentials(s3: S3Server, source: S3Source, mirror: Mirror) -> None:
    """Whatever token the tenant sends, and even if the adapter is already stored."""
    upload(s3, "team/a", weights())
    await mirror.take(source, f"//{BUCKET}/team/a", BASE)
    for access in (SourceAccess(), SourceAccess("hf_any")):
        with pytest.raises(PermissionDenied, match="not be read by tenants"):
            await mirror.take(source, f"//{BUCKET}/team/a", BASE, access)


class LongBody:
    """An S3 client whose objects have more bytes than their headers say."""

    meta = SimpleNamespace(endpoint_url="http://s3")

    def __init__(self) -> None:
        self.num_read = 0

    def get_object(self, **_: Any) -> dict[str, Any]:
        return {"Body": self}

    def iter_chunks(self, size: int) -> Iterator[bytes]:
        while True:
            self.num_read += size
            yield bytes(size)

    def close(self) -> None:
        pass


async def test_a_body_without_end_is_cut(tmp_path: Path) -> None:
    client, path = LongBody(), tmp_path / "w"
    version = SourceVersion("k", "s3://b/a", "//b/a", {CONFIG_FILE: RemoteFile(100_000, "tag")})
    await S3Source(client).fetch(version, CONFIG_FILE, path, 100_000)
    assert path.stat().st_size == 100_000
    assert client.num_read < 300_000


async def test_objects_in_parts(s3: S3Server, source: S3Source, mirror: Mirror) -> None:
    """The ETag of an object uploaded in parts is not a checksum; its content is correct all the same."""
    sites = [m.SiteShape(site.name, 50_000, 16) for site in WIDE]
    content = safetensors(lora_tensors(sites=sites, rank=8))
    base = msgspec.structs.replace(BASE, sites=sites)
    upload(s3, "parts", r=8)
    client, key = s3.client(), {"Bucket": BUCKET, "Key": f"parts/{WEIGHTS_FILE}"}
    upload_id = client.create_multipart_upload(**key)["UploadId"]
    pieces = [content[: 5 << 20], content[5 << 20 :]]
    tags = [client.upload_part(**key, UploadId=upload_id, PartNumber=i + 1, Body=p) for i, p in enumerate(pieces)]
    parts = [{"PartNumber": i + 1, "ETag": tag["ETag"]} for i, tag in enumerate(tags)]
    client.complete_multipart_upload(**key, UploadId=upload_id, MultipartUpload={"Parts": parts})
    version = await source.resolve(f"//{BUCKET}/parts")
    assert version.files[WEIGHTS_FILE].checksum is None
    assert version.files[CONFIG_FILE].checksum is not None
    taken = await mirror.take(source, f"//{BUCKET}/parts", base)
    folder = mirror.blobs.verified(taken.digest)
    assert folder is not None
    assert (folder / WEIGHTS_FILE).read_bytes() == content


async def test_cut_bodies_are_resumed(s3: S3Server, mirror: Mirror) -> None:
    content = safetensors(lora_tensors(sites=WIDE))
    upload(s3, "cut", content)
    async with run_cutter(s3.url) as cutter:
        source = S3Source(s3.client(url=cutter.url), retries=QUICK)
        version = await source.resolve(f"//{BUCKET}/cut")
        path = mirror.blobs.staging("x") / WEIGHTS_FILE
        cutter.cut_at, cutter.num_cuts = 300_000, 3
        await source.fetch(version, WEIGHTS_FILE, path, len(content))
        assert cutter.num_cuts == 0
        assert path.read_bytes() == content
        cutter.cut_at, cutter.num_cuts = 0, 1000
        with pytest.raises(Unavailable, match="was interrupted"):
            await source.fetch(version, CONFIG_FILE, path.with_name("c"), 10)


@pytest.mark.parametrize(
    ("target", "error"),
    [(f"//{BUCKET}/nothing", NotFound), ("//no-such-bucket/a", NotFound), ("//UPPER/a", NotFound),
     (f"//{BUCKET}/../a", NotFound), (f"//{BUCKET}/bare", AdapterRefused), (f"//{BUCKET}/dora", AdapterRefused)],
)  # fmt: skip
async def test_refusals(s3: S3Server, source: S3Source, mirror: Mirror, target: str, error: type[Exception]) -> None:
    upload(s3, "bare")
    upload(s3, "dora", weights(), use_dora=True)
    with pytest.raises(error):
        await mirror.take(source, target, BASE)


async def test_wrong_credentials(s3: S3Server) -> None:
    upload(s3, "team/a", weights())
    with pytest.raises(PermissionDenied, match="no access"):
        await S3Source(s3.client(secret="wrong" * 8)).resolve(f"//{BUCKET}/team/a")


@pytest.mark.parametrize("error", [
    NoCredentialsError(),
    ClientError({"ResponseMetadata": {"HTTPStatusCode": 400}}, "HeadObject"),  # an expired token
], ids=["none", "expired"])  # fmt: skip
async def test_credentials_that_the_store_lacks_are_temporary(s3: S3Server, error: Exception) -> None:
    """What is mirrored stays served until the operator has renewed them."""
    upload(s3, "team/a", weights())
    client = s3.client()

    def fail(**_: object) -> None:
        raise error

    client.meta.events.register("before-call.s3.HeadObject", fail)
    with pytest.raises(Unavailable, match="credentials"):
        await S3Source(client).resolve(f"//{BUCKET}/team/a")


async def test_nobody_there(s3: S3Server) -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await S3Source(s3.client(url="http://127.0.0.1:9")).resolve(f"//{BUCKET}/team/a")


# ---------------------------------------------------------------- the shared bucket


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path) -> SharedBucket:
    return SharedBucket(s3.client(), f"s3://{BUCKET}/{tmp_path.name}")


async def test_what_one_store_has_another_need_not_fetch(
    s3: S3Server, source: S3Source, bucket: SharedBucket, tmp_path: Path
) -> None:
    upload(s3, "shared", weights(), base_model_name_or_path="two")
    first = Mirror(Blobs(tmp_path / "1"), max_bytes=1 << 20, shared_bucket=bucket)
    taken = await first.take(source, f"//{BUCKET}/shared", BASE)
    second = Mirror(Blobs(tmp_path / "2"), max_bytes=1 << 20, shared_bucket=bucket)

    class Unreadable(S3Source):
        def __init__(self) -> None:
            self.__dict__.update(source.__dict__)

        async def fetch(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("fetched from the source")

    again = await second.take(Unreadable(), f"//{BUCKET}/shared", BASE)
    assert (again.digest, second.blobs.named_base(again.version.key)) == (taken.digest, "two")
    folder = second.blobs.verified(taken.digest)
    assert folder is not None
    assert (folder / WEIGHTS_FILE).read_bytes() == weights()
    third = Mirror(Blobs(tmp_path / "3"), max_bytes=1 << 20, shared_bucket=bucket)
    assert await third.restore(taken.digest)
    assert not await third.restore("0" * 64)


@pytest.mark.parametrize("damage", ["flip", "cut", "config"])
async def test_damage_in_the_bucket_is_not_taken_in(
    s3: S3Server, bucket: SharedBucket, tmp_path: Path, damage: str
) -> None:
    local = LocalSource(tmp_path / "root")
    write_adapter(tmp_path / "root" / "a")
    first = Mirror(Blobs(tmp_path / "1"), max_bytes=1 << 20, shared_bucket=bucket)
    digest = (await first.take(local, "a", BASE)).digest
    raw = weights()
    name, body = {
        "flip": (WEIGHTS_FILE, raw[:-1] + bytes([raw[-1] ^ 1])),
        "cut": (WEIGHTS_FILE, raw[:-1]),
        "config": (CONFIG_FILE, json.dumps(lora_config(lora_alpha=1)).encode()),
    }[damage]
    s3.client().put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/blobs/{digest}/{name}", Body=body)
    second = Mirror(Blobs(tmp_path / "2"), max_bytes=1 << 20, shared_bucket=bucket)
    assert not await second.restore(digest)
    assert len(second.blobs) == 0
    assert not list((tmp_path / "2" / "staging").iterdir())


async def test_without_the_bucket_a_store_works_alone(s3: S3Server, tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "a")
    bucket = SharedBucket(s3.client(secret="wrong" * 8), f"s3://{BUCKET}/x")
    mirror = Mirror(Blobs(tmp_path / "1"), max_bytes=1 << 20, shared_bucket=bucket)
    assert (await mirror.take(LocalSource(tmp_path / "root"), "a", BASE)).digest in mirror.blobs
    assert not await mirror.restore("0" * 64)


def test_the_buckets_address_is_checked(s3: S3Server) -> None:
    for url in ("bucket", "s3://", "s3://b", "https://x/y", "hub:org/name"):
        with pytest.raises(BadRequest):
            SharedBucket(s3.client(), url)


# ---------------------------------------------------------------- whole stores


@pytest.fixture
def settings(settings: Settings, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    changes = {"s3_endpoint": s3.url, "s3_buckets": BUCKET, "store_bucket": f"s3://{BUCKET}/shared-{tmp_path.name}"}
    return settings.model_copy(update=changes)


async def test_a_registered_bucket_is_followed(bus: Bus, s3: S3Server, run_store: RunStore) -> None:
    await report(bus, BASE)
    upload(s3, "followed", weights())
    store = run_store(refresh_s=0.1)
    await bus.adapters.register(m.Registration(name="f", source=f"s3://{BUCKET}/followed", asked_ms=now_ms()))
    await bus.adapters.register(m.Registration(name="g", source="s3://other-bucket/a", asked_ms=now_ms()))
    first = await in_state(bus, "f", "on_disk")
    upload(s3, "followed", weights(1))
    second = await in_state(bus, "f", "on_disk", not_digest=first.digest)
    for alias in (first, second):
        await ask(await store.url(), alias.digest)
    assert "not allowed" in (await in_state(bus, "g", "failed")).reason


async def test_a_store_gives_out_what_only_another_has(
    bus: Bus, settings: Settings, tmp_path: Path, run_store: RunStore
) -> None:
    """Only the first store can read the adapter folder; the second has only the bucket."""
    await report(bus, BASE)
    assert settings.adapters is not None
    write_adapter(settings.adapters / "a")
    first = run_store()
    alias = await in_state(bus, "a", "on_disk")
    await first.end()
    second = run_store(adapters=None, data=tmp_path / "other")
    await ask(await second.url(), alias.digest)
    assert await bus.adapters.alias("a") == alias
