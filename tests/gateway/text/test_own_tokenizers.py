"""Adapters' tokenizers run in limited processes, encode as `tokenizers` does, and fail their own requests alone."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from helpers.tokenizer_files import families, tokenizer_file
from tokenizers import Tokenizer

from gateway.sandbox.child import Encode, ReadTokenizer
from gateway.sandbox.sandbox import SandboxPool
from gateway.text.tokenizer import BaseEncoder, OwnEncoder
from peft_adapters.texts.tokenizer_json import key_of, token_table
from protocol.wire.errors import BadRequest
from protocol.wire.tokens import TokenTable

TEXTS = ["Hello  world, 漢字 123 <|end|>", "", "zebra ▁ ab"]
SOME = ["Llama-3", "Llama-2, older", "T5Tokenizer", "GemmaTokenizer", "BertTokenizer", "BloomTokenizer", "DeepSeek"]


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[SandboxPool]:
    pool = SandboxPool(1)
    yield pool
    await pool.close()


def packed(text: str) -> bytes:
    return zlib.compress(text.encode())


def encoder(pool: SandboxPool, file: dict[str, Any]) -> OwnEncoder:
    text = json.dumps(file)
    return OwnEncoder(key_of(text), packed(text), pool)


@pytest.mark.parametrize("name", [name for name in SOME if name in families()])
async def test_texts_become_the_tokens_that_they_always_were(pool: SandboxPool, name: str) -> None:
    file = families()[name]
    own, theirs = encoder(pool, file), Tokenizer.from_str(json.dumps(file))
    theirs.no_truncation()
    theirs.no_padding()
    for special in (True, False):
        expected = theirs.encode_batch(TEXTS, add_special_tokens=special)
        found = await own.encode(TEXTS, add_special_tokens=special, tenant="a")
        assert found == [e.ids for e in expected]
        seen: list[int] = []
        detailed = await own.detailed(TEXTS, add_special_tokens=special, tenant="a", check=seen.append)
        assert seen == [len(e.ids) for e in expected]
        for e, f in zip(expected, detailed, strict=True):
            assert (f.ids, f.offsets, list(f.special), f.tokens) == (e.ids, e.offsets, e.special_tokens_mask, e.tokens)


@pytest.mark.parametrize("name", [name for name in ("BertTokenizer", "Llama-3") if name in families()])
async def test_pairs_and_shortened_texts_are_as_the_base_s(pool: SandboxPool, name: str) -> None:
    file = families()[name]
    own, base = encoder(pool, file), BaseEncoder(Tokenizer.from_str(json.dumps(file)))
    pairs = [("Hello world", "zebra ab"), ("漢字", "123 <|end|>"), ("", "ab")]
    joined = await own.pairs(pairs, tenant="a")
    assert joined == await base.pairs(pairs, tenant="a")
    assert any(pair.second for pair in joined)
    for most in (1, 2, 50):
        cut = await own.shortened(TEXTS, most, tenant="a")
        assert cut == await base.shortened(TEXTS, most, tenant="a")
        lengths = [len(ids) for ids in await base.encode(cut, add_special_tokens=False, tenant="a")]
        assert all(length <= most for length in lengths)
        assert (cut == TEXTS) == (most == 50)


async def test_a_new_process_is_sent_the_file(pool: SandboxPool) -> None:
    text = json.dumps(families()["Llama-3"])
    job = Encode(key_of(text), b"", TEXTS, True, False)
    assert (await pool.do(job, tenant="a")).encoded is None
    own = OwnEncoder(key_of(text), packed(text), pool)
    first = await own.encode(TEXTS, add_special_tokens=True, tenant="a")
    known = (await pool.do(job, tenant="a")).encoded
    assert known is not None
    assert [memoryview(encoded.ids).cast("i").tolist() for encoded in known] == first


async def test_tokens_and_the_id_of_one_are_read(pool: SandboxPool) -> None:
    file = families()["T5Tokenizer"]
    text = json.dumps(file)
    answer = await pool.do(ReadTokenizer(packed(text), "<|end|>"), tenant="a")
    assert msgspec.msgpack.decode(answer.tokens, type=TokenTable) == token_table(text)
    assert answer.id == Tokenizer.from_str(text).token_to_id("<|end|>")
    assert (await pool.do(ReadTokenizer(packed(text), "nothing"), tenant="a")).id is None


GARBAGE = base64.b64encode(b"\x04\x00\x00\x00\xff\xff\xff\xff\x00").decode()


@pytest.mark.parametrize(
    "file",
    [
        tokenizer_file(normalizer={"type": "Precompiled", "precompiled_charsmap": GARBAGE}),
        tokenizer_file(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        tokenizer_file(model={"type": "Unigram", "vocab": [], "unk_id": 5}),
        tokenizer_file(model={"type": "WordLevel", "vocab": {}, "unk_token": "?"}, added_tokens=[]),
        tokenizer_file(pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\p{Mystery}"}, "behavior": "Isolated",
                                      "invert": False}),
    ],
    ids=["a panic", "a merge of no token", "no tokens", "no unknown token", "no regular expression"],
)  # fmt: skip
async def test_what_cannot_encode_fails_its_own_request(pool: SandboxPool, file: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        await encoder(pool, file).encode(["a b"], add_special_tokens=True, tenant="a")
    good = encoder(pool, families()["Llama-3"])
    assert await good.encode(["ab"], add_special_tokens=False, tenant="a")


async def test_a_file_that_unpacks_without_end_is_refused(pool: SandboxPool) -> None:
    bomb = zlib.compress(bytes(256 << 20))
    answer = await pool.do(ReadTokenizer(bomb, ""), tenant="a")
    assert "has more than" in answer.refusal
