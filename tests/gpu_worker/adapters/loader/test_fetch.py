"""Fetching adapters: from any store that answers, and only content that matches the digest."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

import msgspec
import numpy as np
import pytest
from helpers.stub_http import serving
from safetensors.numpy import save

from gpu_worker.adapters.loader.client import Loader
from gpu_worker.adapters.loader.fetch import FetchedAdapter, StoreClient, digest_of
from gpu_worker.adapters.packing.rows import PackedRows, RowPacker, RowSite
from peft_adapters.format import CONFIG_FILE, FOLDER_HEADER, WEIGHTS_FILE
from peft_adapters.texts.files import TEXTS_FIELD, TEXTS_FILE, OwnTexts
from peft_adapters.texts.tokenizer_json import AddedToken, OwnTokenizer
from protocol.wire.errors import AdapterRefused, NotFound
from protocol.wire.messages import ServedModel, SiteShape

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def weights(value: float) -> bytes:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    return save(
        {
            f"{prefix}.lora_A.weight": np.full((2, 4), value, np.float32),
            f"{prefix}.lora_B.weight": np.full((4, 2), value, np.float32),
        }
    )


GOOD = FetchedAdapter(CONFIG, weights(1.0))


@contextmanager
def store(files: dict[str, bytes], folder: Path | None = None, asked: list[str] | None = None) -> Iterator[str]:
    """Serve `files` by URL path, as a store does.

    folder: the store's folder, sent in a header with each config. asked: collects the requested paths.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            if asked is not None:
                asked.append(self.path)
            if folder and self.path.endswith(CONFIG_FILE):
                self.send_header(FOLDER_HEADER, quote(str(folder)))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            return

    with serving(Handler) as url:
        yield url


def with_texts(own: OwnTexts) -> tuple[str, dict[str, bytes]]:
    """Return an adapter's digest and a store's files for it. own: texts of the adapter, which are not validated."""
    texts = msgspec.json.encode(own)
    adapter = FetchedAdapter({**CONFIG, TEXTS_FIELD: hashlib.sha256(texts).hexdigest()}, GOOD.weights)
    digest = digest_of(adapter)
    return digest, {**files_of(digest, adapter), f"/adapters/{digest}/{TEXTS_FILE}": texts}


def files_of(digest: str, adapter: FetchedAdapter) -> dict[str, bytes]:
    folder = f"/adapters/{digest}"
    return {
        f"{folder}/adapter_config.json": json.dumps(adapter.config).encode(),
        f"{folder}/adapter_model.safetensors": bytes(adapter.weights),
    }


@pytest.fixture(params=[StoreClient, Loader])
def client(request: pytest.FixtureRequest) -> Iterator[StoreClient | Loader]:
    """The client in this process, and the same in a loader process."""
    client = request.param()
    yield client
    if isinstance(client, Loader):
        client.close()


def test_a_store_that_lacks_it_or_gives_something_else_is_passed_over(client: StoreClient | Loader) -> None:
    digest = digest_of(GOOD)
    with (
        store({}) as empty,
        store(files_of(digest, FetchedAdapter(CONFIG, weights(2.0)))) as wrong,
        store(files_of(digest, GOOD)) as good,
    ):
        client.set_urls((empty, wrong, "http://127.0.0.1:9", good))
        assert client.fetch(digest) == GOOD


@pytest.mark.parametrize(
    "here", ["the file", "another adapter's", "no adapter's", "a link", "a pipe", "a folder", "a zero byte", "nothing"]
)
def test_a_folder_of_this_machine_is_read_if_it_has_the_adapter(
    client: StoreClient | Loader, here: str, tmp_path: Path
) -> None:
    digest, asked, folder = digest_of(GOOD), list[str](), tmp_path / "with a space, and ü"
    folder.mkdir()
    file = folder / WEIGHTS_FILE
    if here in ("the file", "another adapter's", "no adapter's"):
        content = {"the file": GOOD.weights, "another adapter's": weights(2.0), "no adapter's": b"?" * 100}[here]
        file.write_bytes(content)
    elif here == "a link":
        (tmp_path / "other").write_bytes(GOOD.weights)
        file.symlink_to(tmp_path / "other")
    elif here == "a pipe":
        os.mkfifo(file)
    elif here == "a folder":
        file.mkdir()
    named = folder / "\0" if here == "a zero byte" else folder
    with store(files_of(digest, GOOD), named, asked) as good:
        client.set_urls((good,))
        assert client.fetch(digest) == GOOD
        is_sent = f"/adapters/{digest}/{WEIGHTS_FILE}" in asked
        assert is_sent == (here != "the file")


def test_what_no_store_has_is_not_found_at_once(client: StoreClient | Loader) -> None:
    with store({}) as one, store({}) as other:
        client.set_urls((one, other))
        with pytest.raises(NotFound, match="no adapter store has"):
            client.fetch("0" * 64)


def test_a_fetch_waits_for_the_first_store(client: StoreClient | Loader) -> None:
    digest = digest_of(GOOD)
    with store(files_of(digest, GOOD)) as good:
        found: list[FetchedAdapter | PackedRows] = []
        thread = threading.Thread(target=lambda: found.append(client.fetch(digest)))
        thread.start()
        client.set_urls((good,))
        thread.join(30)
        assert found == [GOOD]


def test_added_tokens_come_with_an_adapter_or_are_refused(client: StoreClient | Loader) -> None:
    token = AddedToken(7, "<|tool|>", special=True, rstrip=True)
    digest, files = with_texts(OwnTexts(tokenizer=OwnTokenizer({"merges": "0"}, [token])))
    plain_digest, plain = with_texts(OwnTexts("{{ messages }}"))
    bad_digest, bad = with_texts(OwnTexts(tokenizer=OwnTokenizer({}, [token, token])))
    with store(files | plain | bad) as good:
        client.set_urls((good,))
        assert client.fetch(digest).added == [token]
        assert client.fetch(plain_digest).added is None
        with pytest.raises(AdapterRefused, match="has a token twice"):
            client.fetch(bad_digest)


def expert_weights() -> bytes:
    """Return the LoRA of rank 2 on both products of 3 experts of width 4."""
    prefix, rng = "base_model.model.model.layers.0.mlp.experts", np.random.default_rng(0)
    sizes = {f"{prefix}{inner}.lora_{half}.weight": size for inner, pair in {
        ".base_layer": ((6, 4), (8, 6)), "": ((6, 4), (4, 6))}.items() for half, size in zip("AB", pair, strict=True)
    }  # fmt: skip
    return save({name: rng.standard_normal(size, np.float32) for name, size in sizes.items()})


EXPERTS = FetchedAdapter(
    CONFIG | {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    expert_weights(),
)


@pytest.mark.parametrize("adapter", [GOOD, EXPERTS], ids=["linear", "experts"])
def test_adapters_for_a_known_model_come_packed_also_after_a_death(adapter: FetchedAdapter) -> None:
    digest = digest_of(adapter)
    sites = [
        RowSite("model.layers.0.self_attn.q_proj", 4, 4, "bfloat16"),
        RowSite("model.layers.0.mlp.experts.gate_up_proj", 4, 8, "bfloat16", 3),
        RowSite("model.layers.0.mlp.experts.down_proj", 4, 4, "bfloat16", 3),
    ]
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="", vocab_size=10, max_model_len=10,
        sites=[
            SiteShape(s.name, s.in_features, s.out_features, "parameter" if s.num_experts else "linear",
                      num_experts=s.num_experts)
            for s in sites
        ],
    )  # fmt: skip
    expected = RowPacker(sites, served).pack(adapter.config, memoryview(adapter.weights), bytearray)
    assert expected is not None
    loader = Loader()
    with closing(loader), store(files_of(digest, adapter)) as good:
        loader.set_urls((good,))
        assert isinstance(loader.fetch(digest), FetchedAdapter)
        loader.describe(sites, served)
        for _ in range(2):
            rows = loader.fetch(digest)
            assert isinstance(rows, PackedRows)
            assert bytes(rows.buffer) == bytes(expected.buffer)
            assert (rows.ranks.tolist(), rows.scales.tolist()) == (expected.ranks.tolist(), expected.scales.tolist())
            os.kill(loader.pid, signal.SIGKILL)
