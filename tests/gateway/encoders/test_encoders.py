"""Encoder routes in OpenAI's and LoRAX's formats with a scripted worker, and their error messages."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import pytest_asyncio
from helpers.scripted_fleet import BASE_NAME, Script, ScriptedFleet, gateway_client
from openai import AsyncOpenAI
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from gateway.encoders.encoder_write import entities_of
from protocol.queue.bus import Bus
from protocol.wire import messages as m

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ada", "lovelace", "lives", "in", "london", ".", "é"]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WIDTH = 4
MAX_LEN = 8


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(4)  # as in files of sentence-transformers; has no effect here
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def says(submit: m.RequestHead, body: m.Body) -> Script:
    """Answer with a vector of the text's length and the call's index, or with one label per token."""
    num, index = len(body.prompt) // 4, int(submit.rid.rpartition("-")[2])
    if body.task == "embed":
        scale = 2.0 if submit.digest else 1.0
        return Script(
            numbers=(np.array([num, index, 3, 4], np.float32) * np.float32(scale)).view(np.int32).tolist(), chunk=99
        )
    ids = memoryview(body.prompt).cast("i").tolist()
    label_of = {"ada": 1, "lovelace": 2, "london": 3, "[CLS]": 1, "[SEP]": 4}
    pairs = [(label_of.get(WORDS[id_], 0), np.float32(0.5 + id_ / 64)) for id_ in ids]
    numbers = [number for label, score in pairs for number in (label, int(score.view(np.int32)))]
    return Script(numbers=numbers, chunk=99)


async def encoder_gateway(
    bus: Bus, fleet: ScriptedFleet, folder: Path, facts: dict[str, Any]
) -> AsyncIterator[httpx2.AsyncClient]:
    fleet.script, fleet.max_model_len, fleet.facts = (
        says,
        MAX_LEN,
        {"vocab_size": len(WORDS), "model_type": "bert", **facts},
    )
    await fleet.register()
    await fleet.add_adapter("legal", "d1" * 32)
    async with gateway_client(bus, folder, max_inputs=3) as http:
        yield http


@pytest_asyncio.fixture
async def embedder(bus: Bus, fleet: ScriptedFleet, encoder_folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async for http in encoder_gateway(
        bus, fleet, encoder_folder, {"task": "embed", "width": WIDTH, "unit_length": True}
    ):
        yield http


@pytest_asyncio.fixture
async def tagger(bus: Bus, fleet: ScriptedFleet, encoder_folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async for http in encoder_gateway(bus, fleet, encoder_folder, {"task": "classify", "labels": LABELS}):
        yield http


async def test_the_official_client_gets_its_embeddings(embedder: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    async with AsyncOpenAI(base_url=f"{embedder.base_url}/v1", api_key="any", max_retries=0) as client:
        texts = ["Ada lives", "ada", "london . ada lovelace"]
        answer = await client.embeddings.create(model="base", input=texts)  # with base64 as default encoding
        assert [(item.index, item.embedding) for item in answer.data] == [
            (0, [4, 0, 3, 4]), (1, [3, 1, 3, 4]), (2, [6, 2, 3, 4])
        ]  # fmt: skip
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (13, 13, "base")
        submit, body = min(fleet.seen, key=lambda pair: pair[0].rid)  # they may arrive in any order
        assert (body.task, submit.max_new_tokens, submit.num_prompt_tokens) == ("embed", 0, 4)
        adapted = await client.embeddings.create(model="legal", input="ada", encoding_format="float")
        assert adapted.data[0].embedding == [6, 0, 6, 8]
        ids = await client.embeddings.create(model=BASE_NAME, input=[[4], [4, 5]], dimensions=2)
        assert [item.embedding[0] for item in ids.data] == pytest.approx([1, 2 / 5**0.5])  # normalized again
        one = await client.embeddings.create(model="base", input=[4, 5, 6])
        assert one.data[0].embedding == [3, 0, 3, 4]


async def test_lorax_s_shapes(embedder: httpx2.AsyncClient) -> None:
    """As its client sends them, with null and false as defaults; its key is returned along with OpenAI's."""
    sent = {"inputs": "ada", "parameters": None, "stream": False}
    assert (await embedder.post("/embed", json=sent)).json() == {"embeddings": [3, 0, 3, 4]}
    adapted = {"inputs": "ada", "parameters": {"adapter_id": "legal", "adapter_source": "local"}}
    assert (await embedder.post("/embed", json=adapted)).json() == {"embeddings": [6, 0, 6, 8]}
    answer = (await embedder.post("/v1/embeddings", json={"model": "x", "input": "ada", "parameters": {}})).json()
    assert answer["embeddings"] == answer["data"] == [{"object": "embedding", "index": 0, "embedding": [3, 0, 3, 4]}]
    body = {"model": "base", "input": "ada", "encoding_format": "base64"}
    coded = (await embedder.post("/v1/embeddings", json=body)).json()
    assert "embeddings" not in coded
    assert np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4").tolist() == [3, 0, 3, 4]
    info = (await embedder.get("/info")).json()
    assert (info["model_pipeline_tag"], info["max_input_length"]) == ("feature-extraction", MAX_LEN)
    assert (await embedder.get("/startup")).status_code == 200


LONG = "ada " * 7


WRONG_EMBEDDINGS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "base", "input": []}, 400, "input is an empty list"),
    ({"model": "base", "input": ""}, 400, "input: a text is empty"),
    ({"model": "base", "input": ["ada", ""]}, 400, "input: a text is empty"),
    ({"model": "base", "input": [[]]}, 400, "input: a text is empty"),
    ({"model": "base", "input": ["a"] * 4}, 400, "input has 4 texts; the limit is 3"),
    ({"model": "base", "input": LONG}, 400, "input: a text has 9 tokens; this model takes at most 8"),
    ({"model": "base", "input": [[4] * 9]}, 400, "input: a text has 9 tokens; this model takes at most 8"),
    ({"model": "base", "input": [4, 11]}, 400, "input: token id 11 is out of vocabulary, whose 11 tokens count from 0"),
    ({"model": "base", "input": [-1]}, 400, "input: token id -1 is out of vocabulary, whose 11 tokens count from 0"),
    ({"model": "base", "input": 5}, 400, "input: "),
    ({"model": "base"}, 400, "input: it is missing"),
    ({"model": 5, "input": "ada"}, 400, "model: "),
    ({"model": "base", "input": "ada", "dimensions": 5}, 400, "dimensions is 5; this model's embeddings have 4"),
    ({"model": "base", "input": "ada", "dimensions": 0}, 400, "dimensions: "),
    ({"model": "base", "input": "ada", "encoding_format": "hex"}, 400, "encoding_format: "),
    ({"model": "nobody", "input": "ada"}, 404, "The model `nobody` does not exist"),
]


async def test_wrong_embeddings_requests_say_what_is_wrong(embedder: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for body, status, said in WRONG_EMBEDDINGS:
        answer = await embedder.post("/v1/embeddings", json=body)
        assert (answer.status_code, answer.json()["error"]["message"][: len(said)]) == (status, said)
    assert not fleet.seen


async def test_labels_become_entities(tagger: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    text = "É . Ada Lovelace in London"
    answer = await tagger.post("/classify", json={"inputs": text, "parameters": None, "stream": False})
    assert answer.json() == [
        {"entity_group": "PER", "score": 0.5 + 4.5 / 64, "word": "ada lovelace", "start": 4, "end": 16},
        {"entity_group": "LOC", "score": 0.5 + 8 / 64, "word": "london", "start": 20, "end": 26},
    ]
    assert fleet.seen[0][1].task == "classify"
    assert answer.headers["x-compute-type"] == "cpu+optimized"
    assert all(answer.headers[f"x-{part}-time"].isdigit() for part in ("compute", "validation", "queue", "inference"))
    batch = await tagger.post("/classify_batch", json={"inputs": ["lives", "in London"]})
    assert [[entity["word"] for entity in found] for found in batch.json()] == [[], ["london"]]
    adapted = {"inputs": "ada", "parameters": {"adapter_id": "legal"}}
    assert len((await tagger.post("/classify", json=adapted)).json()) == 1
    assert fleet.seen[-1][0].digest == "d1" * 32
    assert (await tagger.get("/info")).json()["model_pipeline_tag"] == "token-classification"
    assert (await tagger.get("/startup")).status_code == 200


WRONG_NATIVE: list[tuple[str, dict[str, Any], int, str]] = [
    ("/classify", {"inputs": ""}, 422, "Input validation error: `inputs` cannot be empty"),
    ("/classify", {"inputs": LONG}, 422, "Input validation error: `inputs` must have less than 9 tokens. Given: 9"),
    ("/classify", {}, 422, "Input validation error: inputs: it is missing"),
    ("/classify_batch", {"inputs": []}, 422, "Input validation error: inputs is an empty list"),
    ("/classify_batch", {"inputs": ["a"] * 4}, 422, "Input validation error: inputs has 4 texts; the limit is 3"),
    ("/classify", {"inputs": "a", "parameters": {"adapter_id": "nobody"}}, 424, "Request failed during generation"),
    ("/embed", {"inputs": "a"}, 422, f"Input validation error: {BASE_NAME} (bert) labels tokens; embeddings need"),
    ("/generate", {"inputs": "a"}, 422, "Input validation error: Classify models don't support text generation"),
]


async def test_wrong_native_requests_say_what_is_wrong(tagger: httpx2.AsyncClient) -> None:
    for path, body, status, said in WRONG_NATIVE:
        answer = await tagger.post(path, json=body)
        assert (answer.status_code, answer.json()["error"][: len(said)]) == (status, said)


async def test_an_encoder_generates_no_text(embedder: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    message = (
        f"Embedding models don't support text generation: {BASE_NAME} is an encoder (bert) and computes embeddings"
    )
    for path, body in (
        ("/v1/completions", {"model": "base", "prompt": "ada"}),
        ("/v1/chat/completions", {"model": "legal", "messages": [{"role": "user", "content": "ada"}]}),
        ("/v1/completions", {"model": "base", "prompt": "ada", "background": True}),
    ):
        answer = await embedder.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    answer = await embedder.post("/", json={"inputs": "ada"})
    assert (answer.status_code, answer.json()) == (
        422, {"error": f"Input validation error: {message}", "error_type": "validation"}
    )  # fmt: skip
    assert not fleet.seen


async def test_a_decoder_says_that_it_is_none(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    why = f"{BASE_NAME} (tiny) generates text; "
    answer = await http.post("/v1/embeddings", json={"model": "base", "input": "hi"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"{why}embeddings need an encoder as base model"
    for path, needed in (("/embed", "embeddings need an encoder"), ("/classify", "labels need a token classifier")):
        answer = await http.post(path, json={"inputs": "hi"})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert answer.json()["error"] == f"Input validation error: {why}{needed} as base model"
    assert (await http.post("/classify_batch", json={"inputs": ["hi"]})).status_code == 422
    assert not fleet.seen


def test_where_entities_begin_and_end() -> None:
    """Each B- prefix and each change of the tag starts an entity; labels without prefix are tags; nothing else does."""
    text = "aa bb cc dd ee ff"
    offsets: list[tuple[int, int] | None] = [None, *((3 * i, 3 * i + 2) for i in range(6)), None]
    names = ["O", "B-X", "I-X", "I-Y", "MISC", "B-a-b"]

    def found(*labels: int) -> list[tuple[str, str]]:
        entities = entities_of(text, offsets, np.array([1, *labels, 1]), np.full(8, 0.5, np.float32), names)
        assert all(text[e["start"] : e["end"]] == e["word"] and e["score"] == 0.5 for e in entities)
        return [(e["entity_group"], e["word"]) for e in entities]

    assert found(0, 0, 0, 0, 0, 0) == []
    assert found(1, 2, 2, 0, 2, 2) == [("X", "aa bb cc"), ("X", "ee ff")]
    assert found(1, 1, 2, 3, 3, 0) == [("X", "aa"), ("X", "bb cc"), ("Y", "dd ee")]
    assert found(4, 4, 0, 5, 5, 0) == [("MISC", "aa bb"), ("a-b", "dd"), ("a-b", "ee")]


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"model": "legal", "input": ["ada", "ada lives"], "dimensions": 2}),
    ("/embed", {"inputs": "ada"}),
    ("/v1/rerank", {"model": "base", "query": "ada", "documents": ["london", "ada lives"]}),
    ("/v1/score", {"model": "base", "text_1": "ada", "text_2": ["london", "ada lives"]}),
]


async def asked_twice(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str, body: dict[str, Any]) -> None:
    """Send a request twice with an Idempotency-Key: it is computed once; with another body, the key is refused."""
    fleet.seen.clear()
    headers = {"idempotency-key": f"key of {path}"}
    first = await http.post(path, json=body, headers=headers)
    num = len(fleet.seen)
    second = await http.post(path, json=body, headers=headers)
    assert (first.status_code, second.status_code) == (200, 200), second.text
    assert second.json() == first.json()
    assert len(fleet.seen) == num > 0, "nothing is computed again"
    reused = await http.post("/v1/embeddings", json={"model": "base", "input": "x"}, headers=headers)
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(fleet.seen) == num


async def test_a_repeated_key_finds_vectors_and_likenesses(embedder: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path, body in ASKED:
        await asked_twice(embedder, fleet, path, body)


async def test_a_repeated_key_finds_labels_with_their_places(tagger: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    headers = {"idempotency-key": "k"}
    for path, inputs in (("/classify", "Ada lives in London"), ("/classify_batch", ["ada", "Lives in London ."])):
        headers["idempotency-key"] += path
        first, second = [
            (await tagger.post(path, json={"inputs": inputs}, headers=headers)).json() for _ in range(2)
        ]  # fmt: skip
        assert first == second
        assert any(
            entity["word"] == "london" for found in first for entity in (found if path != "/classify" else [found])
        )
    assert len(fleet.seen) == 3


async def test_embeddings_in_the_background(embedder: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = {"model": "legal", "input": ["ada", "ada lives"], "dimensions": 2, "encoding_format": "base64"}
    at_once = (await embedder.post("/v1/embeddings", json=body)).json()
    headers = {"idempotency-key": "k"}
    made = await embedder.post("/v1/embeddings", json={**body, "background": True}, headers=headers)
    assert made.status_code == 202, made.text
    job = made.json()
    assert {submit.cls for submit, _ in fleet.seen} >= {"interactive"}
    done = (await embedder.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})).json()
    assert (done["status"], done["endpoint"], done["model"]) == ("completed", "/v1/embeddings", "legal")
    assert done["result"] == at_once
    assert (done["tokens_generated"], done["error"]) == (0, None)
    assert {submit.cls for submit, _ in fleet.seen} == {"interactive", "batch"}
    again = await embedder.post("/v1/embeddings", json={**body, "background": True}, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, job["id"])
    stream = await embedder.get(f"/v1/jobs/{job['id']}/stream")
    assert (stream.status_code, "is not streamed" in stream.text) == (400, True)
    floats = (await embedder.post("/v1/embeddings", json={"model": "base", "input": "ada", "background": True})).json()
    found = (await embedder.get(f"/v1/jobs/{floats['id']}", headers={"prefer": "wait=20"})).json()["result"]
    assert found["data"] == [{"object": "embedding", "index": 0, "embedding": [3, 0, 3, 4]}]
