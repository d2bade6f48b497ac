"""Labels of texts, scores and ranks of pairs in the formats of vLLM, Cohere and Jina, with a scripted worker."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import pytest_asyncio
from helpers.scripted_fleet import BASE_NAME, Script, ScriptedFleet, gateway_client, make_model_folder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from gateway.encoders.scores import activated
from protocol.queue.bus import Bus
from protocol.wire import messages as m

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ada", "lovelace", "lives", "in", "london", "paris"]
MAX_LEN = 9
LABELS = ["bad", "good"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def ids_of(body: m.Body) -> list[int]:
    return memoryview(body.prompt).cast("i").tolist()


def says(submit: m.RequestHead, body: m.Body) -> Script:
    """Answer with logits of which the last depends on the text's length, or with a vector of word counts."""
    ids = ids_of(body)
    if body.task == "embed":
        numbers = np.bincount(ids, minlength=len(WORDS)).astype(np.float32)
    else:
        numbers = np.ones({"": 2, "e1" * 32: 1}.get(submit.digest, 3), np.float32)
        numbers[-1] = len(ids) - 6 + 2 * (body.second == 4)
    return Script(numbers=numbers.view(np.int32).tolist(), chunk=9999)


@asynccontextmanager
async def gateway(
    bus: Bus, fleet: ScriptedFleet, folder: Path, settings: dict[str, Any], **facts: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    fleet.script, fleet.max_model_len = says, facts.pop("max_model_len", MAX_LEN)
    fleet.facts = {"vocab_size": len(WORDS), "model_type": "bert", **facts}
    await fleet.register()
    await fleet.add_adapter("ranker", "e1" * 32, num_labels=1)
    await fleet.add_adapter("moods", "d1" * 32, num_labels=3)
    async with gateway_client(bus, folder, max_inputs=3, **settings) as http:
        yield http


@pytest_asyncio.fixture
async def classifier(bus: Bus, fleet: ScriptedFleet, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    facts = {"task": "score", "labels": LABELS, "label_head": "classifier", "activation": "softmax"}
    async with gateway(bus, fleet, folder, {}, **facts) as http:
        yield http


@pytest_asyncio.fixture
async def embedder(bus: Bus, fleet: ScriptedFleet, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async with gateway(bus, fleet, folder, {}, task="embed", width=len(WORDS)) as http:
        yield http


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


async def test_vllm_s_classification(classifier: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path in ("/v1/classify", "/classify"):
        sent = {"model": "base", "input": ["ada lives in london ada lives", "ada"]}
        answer = (await classifier.post(path, json=sent)).json()
        shown = {key: answer[key] for key in ("object", "model", "usage")}
        usage = {"prompt_tokens": 11, "total_tokens": 11, "completion_tokens": 0, "prompt_tokens_details": None}
        assert shown == {"object": "list", "model": "base", "usage": usage}
        assert answer["id"].startswith("classify-")
        assert [(row["index"], row["label"], row["num_classes"]) for row in answer["data"]] == [
            (0, "good", 2), (1, "bad", 2)
        ]  # fmt: skip
        assert answer["data"][0]["probs"] == pytest.approx([sigmoid(-1), sigmoid(1)])
    assert fleet.seen[0][1].task == "score"
    assert fleet.seen[0][0].needs == ["score"]
    [adapted] = (await classifier.post("/v1/classify", json={"model": "moods", "input": [[4, 5]]})).json()["data"]
    assert (adapted["label"], adapted["num_classes"]) == ("LABEL_0", 3)
    sent = {"model": "moods", "input": "ada", "use_activation": False}
    [raw] = (await classifier.post("/v1/classify", json=sent)).json()["data"]
    assert raw["probs"] == [1, 1, -3]
    assert (await classifier.get("/startup")).status_code == 200


async def test_lorax_s_classification_of_texts(classifier: httpx2.AsyncClient) -> None:
    text = "ada lives in london ada lives"
    assert (await classifier.post("/classify", json={"inputs": text, "parameters": None})).json() == [
        {"label": "good", "score": pytest.approx(sigmoid(1))}, {"label": "bad", "score": pytest.approx(sigmoid(-1))}
    ]  # fmt: skip
    sent = {"inputs": ["ada", text], "parameters": {"adapter_id": "moods"}}
    batch = (await classifier.post("/classify_batch", json=sent)).json()
    assert [found[0]["label"] for found in batch] == ["LABEL_0", "LABEL_2"]


async def test_ranks_of_a_cross_encoder(classifier: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        sent = {"model": "ranker", "query": "ada lives", "documents": ["paris", {"text": "in london"}, "london"]}
        answer = (await classifier.post(path, json=sent)).json()
        assert answer["id"].startswith("rerank-")
        assert answer["results"] == [
            {"index": 1, "document": {"text": "in london"}, "relevance_score": pytest.approx(sigmoid(3))},
            {"index": 0, "document": {"text": "paris"}, "relevance_score": pytest.approx(sigmoid(2))},
            {"index": 2, "document": {"text": "london"}, "relevance_score": pytest.approx(sigmoid(2))},
        ]
        assert (answer["model"], answer["usage"]) == ("ranker", {"prompt_tokens": 19, "total_tokens": 19})
        assert {(body.task, body.second) for _, body in fleet.seen} == {("score", 4)}
        more = {"top_n": 1, "return_documents": False, "use_activation": False}
        assert (await classifier.post(path, json=sent | more)).json()["results"] == [
            {"index": 1, "relevance_score": 3.0}
        ]
    del fleet.seen[:]
    sent = {"model": "ranker", "query": "ada", "documents": ["paris london paris london"], "max_tokens_per_doc": 2}
    assert (await classifier.post("/v1/rerank", json=sent)).status_code == 200
    assert ids_of(fleet.seen[0][1]) == [2, 4, 3, 9, 8, 3]


async def test_scores_of_pairs_in_each_of_their_forms(classifier: httpx2.AsyncClient) -> None:
    for names in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        for firsts, seconds, expected in (
            ("ada lives", "paris", [2]),
            ("ada lives", ["paris", "in paris"], [2, 3]),
            (["ada lives", "ada"], ["paris", "in paris"], [2, 0]),
        ):
            sent = {"model": "ranker", names[0]: firsts, names[1]: seconds, "use_activation": False}
            answer = (await classifier.post("/v1/score", json=sent)).json()
            assert answer["data"] == [
                {"index": i, "object": "score", "score": score} for i, score in enumerate(expected)
            ]  # fmt: skip
            assert answer["object"] == "list"
    sent = {"model": "ranker", "text_1": "ada lives", "text_2": "paris"}
    assert (await classifier.post("/score", json=sent)).json()["data"][0]["score"] == pytest.approx(sigmoid(2))


async def test_embeddings_are_compared_by_cosine(embedder: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    sent = {"model": "base", "query": "ada", "documents": ["paris london", "ada london"], "max_tokens_per_doc": 1}
    answer = (await embedder.post("/v1/rerank", json=sent)).json()
    assert [(row["index"], row["relevance_score"]) for row in answer["results"]] == [
        (1, pytest.approx(1)), (0, pytest.approx(2 / 3))
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 9
    assert {body.task for _, body in fleet.seen} == {"embed"}
    sent = {"model": "moods", "text_1": ["ada", "paris"], "text_2": ["ada", "london london"]}
    scores = [row["score"] for row in (await embedder.post("/score", json=sent)).json()["data"]]
    assert scores == pytest.approx([1, 2 / math.sqrt(3 * 6)])
    refused = await embedder.post("/score", json=sent | {"use_activation": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "use_activation")


LONG = "ada " * 8
PAIR = {"model": "ranker", "text_1": "ada", "text_2": "paris"}
RANK = {"model": "ranker", "query": "ada", "documents": ["paris"]}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/classify", {"model": "base"}, "input: it is missing, and so is messages"),
    ("/v1/classify", {"model": "base", "input": ["ada"] * 4}, "input has 4 texts; the limit is 3"),
    ("/classify", {"model": "base", "input": ""}, "input: a text is empty"),
    ("/classify", {"input": "ada", "inputs": "ada"}, "Unknown parameter: `inputs`."),
    ("/v1/classify", {"input": LONG}, "input: a text has 10 tokens; this model takes at most 9"),
    ("/v1/classify", {"input": "a", "messages": [{"role": "user", "content": "a"}]}, "messages has no effect with"),
    ("/v1/classify", {"input": "a", "truncate_prompt_tokens": 3}, "`truncate_prompt_tokens` is not supported"),
    ("/v1/classify", {"messages": [{"role": "user", "content": "a"}]}, "this model has no chat template"),
    ("/v1/rerank", {**RANK, "documents": []}, "documents is an empty list"),
    ("/v1/rerank", {**RANK, "documents": ["a"] * 4}, "documents has 4 pairs; the limit is 3"),
    ("/v1/rerank", {**RANK, "documents": ["a", {"text": 3}]}, "documents[1] must be a string, or an object with"),
    ("/v1/rerank", {**RANK, "documents": [{"text": "a", "title": "b"}]}, "documents[0].title has no effect"),
    ("/v1/rerank", {**RANK, "documents": ["a", ""]}, "documents: a text is empty"),
    ("/v1/rerank", {**RANK, "documents": [LONG]}, "documents: a pair has 12 tokens; this model takes at most 9"),
    ("/v1/rerank", {**RANK, "query": ""}, "query is empty"),
    ("/v1/rerank", {**RANK, "top_n": -1}, "top_n: "),
    ("/v1/rerank", {**RANK, "model": "moods"}, "moods has 3 labels, but scoring pairs needs exactly one"),
    ("/v1/rerank", {**RANK, "model": "base"}, f"{BASE_NAME} has 2 labels, but scoring pairs needs exactly one"),
    ("/v1/score", {**PAIR, "text_2": ["a"] * 4}, "text_2 has 4 pairs; the limit is 3"),
    ("/v1/score", {**PAIR, "text_1": ["a"] * 2}, "text_1 has 2 texts and text_2 1: they must be as many, or one"),
    ("/v1/score", {**PAIR, "documents": "a"}, "the texts must be text_1 and text_2, or queries and documents, or"),
    ("/v1/score", {"model": "ranker", "text_1": "a"}, "the texts must be text_1 and text_2"),
    ("/v1/score", {**PAIR, "text_1": []}, "text_1 has 0 texts and text_2 1"),
    ("/v1/score", {**PAIR, "encoding_format": "base64"}, "`encoding_format` is not supported: scores are JSON"),
    ("/v1/embeddings", {"model": "base", "input": "a"}, f"{BASE_NAME} (bert) labels texts; embeddings need an encoder"),
]


async def test_a_long_query_is_counted_in_each_pair(bus: Bus, fleet: ScriptedFleet, folder: Path) -> None:
    facts = {"task": "score", "labels": ["relevance"], "label_head": "classifier"}
    async with gateway(bus, fleet, folder, {"max_call_tokens": 17}, **facts) as http:
        sent = {"model": "base", "query": "ada " * 5, "documents": ["paris"] * 3}
        error = (await http.post("/v1/rerank", json=sent)).json()["error"]
        assert error["message"].endswith("have 18 tokens in total; the limit per call is 17")
        assert error["code"] == "limit_exceeded"
        assert not fleet.seen
        sent["documents"] = ["paris"]
        assert (await http.post("/v1/rerank", json=sent)).status_code == 200


async def test_wrong_requests_say_what_is_wrong(classifier: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path, body, said in WRONG:
        answer = await classifier.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["message"][: len(said)]) == (400, said), body
    for path in ("/v1/rerank", "/v1/score", "/classify"):
        body = {"/v1/rerank": RANK, "/v1/score": PAIR, "/classify": {"input": "a"}}[path]
        answer = await classifier.post(path, json={**body, "model": "nobody"})
        assert (answer.status_code, answer.json()["error"]["message"][:24]) == (404, "The model `nobody` does ")
    assert not fleet.seen


async def test_a_base_without_a_head_answers_by_adapters(bus: Bus, fleet: ScriptedFleet, folder: Path) -> None:
    async with gateway(bus, fleet, folder, {}, task="score", label_head="classifier") as http:
        answer = await http.post("/v1/classify", json={"model": "base", "input": "ada"})
        assert (
            answer.json()["error"]["message"] == f"{BASE_NAME} has no classification head: use an adapter that has one"
        )
        assert (await http.post("/v1/classify", json={"model": "moods", "input": "ada"})).status_code == 200
        assert (await http.post("/v1/score", json=PAIR)).status_code == 200
        assert (await http.get("/startup")).status_code == 200


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'query' %}Q {{ message.content }}{% endif %}"
    "{% if message.role == 'document' %} D {{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} A{% endif %}"
)


async def test_a_reranker_is_asked_by_a_prompt(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "decoder")
    facts = {"tasks": ["embed", "score"], "labels": ["LABEL_0"], "max_model_len": 64, "vocab_size": 300, "width": 300}
    sent = {"model": "base", "query": "the fox", "documents": ["the dog", "sun"]}
    async with gateway(bus, fleet, folder, {}, **facts) as http:
        answer = await http.post("/v1/rerank", json=sent)
        assert answer.status_code == 400
        assert "its chat template has no roles query and document" in answer.json()["error"]["message"]
        chat = {"model": "base", "messages": [{"role": "user", "content": "the fox"}]}
        refused = await http.post("/v1/chat/completions", json={**chat, "model": "moods"})
        assert (refused.status_code, "generates no text" in refused.text) == (400, True), refused.text
        assert len((await http.post("/v1/classify", json=chat)).json()["data"]) == 1
        told = fleet.tokenizer.decode(ids_of(fleet.seen[0][1]), skip_special_tokens=False)
        assert told == "<|im_start|>user\nthe fox<|im_end|>\n"
    file = tmp_path / "pairs.jinja"
    file.write_text(TEMPLATE)
    for place in ("setting", "folder"):
        del fleet.seen[:]
        if place == "folder":
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        async with gateway(bus, fleet, folder, {"pair_template": file} if place == "setting" else {}, **facts) as http:
            answer = await http.post("/v1/rerank", json=sent)
            assert answer.status_code == 200
            texts = {fleet.tokenizer.decode(ids_of(body)) for _, body in fleet.seen}
            assert texts == {"Q the fox D the dog A", "Q the fox D sun A"}


def test_activations() -> None:
    logits = np.array([0.5, -2, 3], np.float32)
    assert activated(logits, "none").tolist() == logits.tolist()
    assert activated(logits, "sigmoid") == pytest.approx([sigmoid(x) for x in (0.5, -2, 3)])
    total = sum(math.exp(x) for x in (0.5, -2, 3))
    for activation in ("", "softmax"):
        assert activated(logits, activation) == pytest.approx([math.exp(x) / total for x in (0.5, -2, 3)])
        assert activated(logits[:1], activation) == pytest.approx([sigmoid(0.5)])
    assert activated(np.array([-200, 200], np.float32), "sigmoid").tolist() == [0, 1]
