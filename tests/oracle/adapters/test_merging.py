"""Adapters merged at request time equal the results of PEFT's `add_weighted_adapter`, whatever runs beside them."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from helpers import examples
from oracle.adapters.kind_cases import CASES
from oracle.adapters.peft_kinds import (
    GPT2,
    LLAMA,
    MAX_DIFFERENCE,
    TIED,
    Base,
    Kind,
    base_for,
    difference,
    engine_logits,
    make_adapter,
    make_base,
    model_logits,
    read_files,
)
from oracle.peft_oracle import TINY_VOCAB, ask, greedy_request, oracle_settings, prompts, refusal
from peft import PeftModel
from safetensors.torch import load_file, save_file

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.merges import MergeWatch
from gpu_worker.adapters.packing.merging import MergeInput, Merger
from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from peft_adapters.config import read_config
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.reasons import Reasons
from peft_adapters.recipe import Merge, Strategy, check_merge, digest_of_merge, merge_of
from peft_adapters.spec import AdapterSpec, LoraWeights
from protocol.wire.errors import AdapterRefused, BadRequest
from protocol.wire.messages import ServedModel, SiteShape

WEIGHTS = [0.7, -0.4, 1.3]
NAMES = ["a", "b", "c"]
LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["wide"]}
STRATEGIES: dict[Strategy, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 5},
    "ties": {"density": 0.6},
    "ties_svd": {"density": 0.6},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7},
    "dare_linear_svd": {"density": 0.7},
    "dare_ties_svd": {"density": 0.7},
    "magnitude_prune": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}
UNPRUNED = {"dare_linear_svd": {"density": 1.0}, "magnitude_prune_svd": {"density": 1.0}}  # fmt: skip


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class Merging:
    """An engine, and PEFT with the same adapters."""

    def __init__(self, base: Base, options: dict[str, dict[str, Any]], root: Path, **settings: Any) -> None:
        self.base = base
        self.folders: dict[str, Path] = {}
        self.reads: list[str] = []
        for i, (name, fields) in enumerate(options.items()):
            self.folders[digest_of(name)] = root / name
            make_adapter(Kind(base, fields), root / name, seed=i)
        model = prepare_model(make_base(base), frozenset(), None)
        self.engine: Engine = build_engine(model, oracle_settings(**settings), self._fetch, None)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, *others = options
            self.peft = PeftModel.from_pretrained(base_for(Kind(base)), str(root / first), adapter_name=first)
            for name in others:
                self.peft.load_adapter(str(root / name), adapter_name=name)
        self.peft.eval()

    def _fetch(self, digest: str) -> FetchedAdapter:
        self.reads.append(digest)
        return read_files(self.folders[digest])

    def expected(self, name: str, prompt: np.ndarray, ids: list[int], **options: Any) -> torch.Tensor:
        seed = options.pop("seed", 0)
        # Called after PEFT has drawn initial values of the new adapter, which it then discards.
        seeding = mock.patch("peft.tuners.lora.model._freeze_adapter", side_effect=lambda *_: torch.manual_seed(seed))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), seeding:
            warnings.simplefilter("ignore")
            self.peft.add_weighted_adapter(adapter_name=name, **options)
            self.peft.set_adapter(name)
        return model_logits(self.peft, prompt, ids)


def merge_digest(names: list[str], weights: list[float], **fields: Any) -> str:
    return digest_of_merge(
        Merge(adapters=[bytes.fromhex(digest_of(name)) for name in names], weights=weights, **fields)
    )


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Merging:
    targets = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "v_proj"], "c": ["q_proj", "down_proj"]}
    options = {
        name: {"target_modules": leaves, "lora_alpha": 4 + i} for i, (name, leaves) in enumerate(targets.items())
    }
    return Merging(LLAMA, options, tmp_path_factory.mktemp("merging"))


@pytest.mark.parametrize(
    ("strategy", "fields"),
    [*STRATEGIES.items(), *UNPRUNED.items()],
    ids=[*STRATEGIES, *(f"{strategy} unpruned" for strategy in UNPRUNED)],
)
def test_merges_are_those_of_peft(strategy: Strategy, fields: dict[str, Any], merging: Merging) -> None:
    prompt = prompts(1, TINY_VOCAB, (20,))[0]
    digest = merge_digest(NAMES, WEIGHTS, strategy=strategy, seed=3, **fields)
    requests = [greedy_request("merged", digest, prompt, 4), greedy_request("a", digest_of("a"), prompt, 4)]
    got = engine_logits(merging.engine, requests)
    ids, logits = got["merged"]
    expected = merging.expected(
        strategy, prompt, ids, adapters=NAMES, weights=WEIGHTS, combination_type=strategy, seed=3, **fields
    )
    assert difference(logits, expected) <= MAX_DIFFERENCE
    base = model_logits(make_base(LLAMA), prompt, ids)
    assert (expected - base).abs().max() >= 100 * MAX_DIFFERENCE
    merging.peft.set_adapter("a")
    assert difference(got["a"][1], model_logits(merging.peft, prompt, got["a"][0])) <= MAX_DIFFERENCE
    merging.peft.delete_adapter(strategy)


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (GPT2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        (TIED, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (LLAMA, {"target_modules": r".*\.1\..*_proj", "use_rslora": True}),
        (LLAMA, {"layers_to_transform": [1], "rank_pattern": {"q_proj": 6}}),
    ],
    ids=["conv1d", "both ends", "pattern", "some layers"],
)
@pytest.mark.parametrize("strategy", examples.some(["cat", "dare_ties_svd", "ties"], "dare_ties_svd"))
def test_merges_of_other_adapters_too(base: Base, fields: dict[str, Any], strategy: Strategy, tmp_path: Path) -> None:
    options = STRATEGIES[strategy]
    merging = Merging(base, dict.fromkeys(NAMES, fields), tmp_path)
    prompt = prompts(1, TINY_VOCAB, (20,))[0]
    digest = merge_digest(NAMES, WEIGHTS, strategy=strategy, **options)
    ids, logits = engine_logits(merging.engine, [greedy_request("merged", digest, prompt, 3)])["merged"]
    expected = merging.expected(
        "merged", prompt, ids, adapters=NAMES, weights=WEIGHTS, combination_type=strategy, **options
    )
    assert difference(logits, expected) <= MAX_DIFFERENCE


@pytest.mark.parametrize("names", ["a", "ab", "ba"])
def test_merges_of_all_linear_adapters(names: str, tmp_path: Path) -> None:
    merging = Merging(LLAMA, {"a": {"target_modules": "all-linear"}, "b": {"target_modules": ["q_proj"]}}, tmp_path)
    config = tmp_path / "a" / CONFIG_FILE  # in which PEFT's save has replaced the word by names
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": "all-linear"}))
    prompt, weights = prompts(1, TINY_VOCAB, (20,))[0], WEIGHTS[: len(names)]
    request = greedy_request("merged", merge_digest([*names], weights), prompt, 3)
    ids, logits = engine_logits(merging.engine, [request])["merged"]
    expected = merging.expected("merged", prompt, ids, adapters=[*names], weights=weights, combination_type="linear")
    assert difference(logits, expected) <= MAX_DIFFERENCE


def test_a_merge_is_loaded_once_and_kept_under_its_own_digest(merging: Merging) -> None:
    digest = merge_digest(["a", "c"], [0.5, 0.5])
    merging.reads.clear()
    prompt = prompts(1, TINY_VOCAB, (20,))[0]
    for i in range(2):
        ask(merging.engine, [greedy_request(f"{i}{j}", digest, prompt, 3) for j in range(3)])
    assert merging.reads == [digest_of("a"), digest_of("c")]
    assert digest in merging.engine.adapters.resident
    other = merge_digest(["a", "c"], [0.5, 0.25])
    assert other != digest
    assert merge_of(other) == Merge(adapters=[bytes.fromhex(digest_of(n)) for n in "ac"], weights=[0.5, 0.25])


def test_lorax_arithmetic(merging: Merging) -> None:
    """Both factors are weighted, so half weight yields a quarter of the adapter. The first adapter's scale is used."""
    prompt = prompts(1, TINY_VOCAB, (20,))[0]
    quarter = greedy_request("scaled", digest_of("a"), prompt, 4, lora_scale=0.25)
    halved = greedy_request("lorax", merge_digest(["a"], [0.5], arithmetic="lorax"), prompt, 4)
    twice = greedy_request("twice", merge_digest(["a", "a"], [0.5, 0.5], arithmetic="lorax"), prompt, 4)
    plain = greedy_request("plain", digest_of("a"), prompt, 4)
    got = engine_logits(merging.engine, [quarter, halved, twice, plain])
    assert torch.allclose(got["lorax"][1], got["scaled"][1], atol=MAX_DIFFERENCE)
    assert torch.allclose(got["twice"][1], got["plain"][1], atol=MAX_DIFFERENCE)
    assert not torch.allclose(got["lorax"][1], got["plain"][1], atol=0.1)


@pytest.mark.parametrize("strategy", ["ties_svd", "cat"])
def test_a_merge_that_takes_too_long_is_refused(strategy: Strategy, tmp_path: Path) -> None:
    merging = Merging(LLAMA, {"a": {}, "b": {}}, tmp_path, merge_timeout_s=1e-9)
    digest = merge_digest(["a", "b"], [0.5, 0.5], strategy=strategy, density=0.5)
    error = refusal(merging.engine, greedy_request("slow", digest, prompts(1, TINY_VOCAB, (8,))[0], 3))
    assert (error.status, "merge_timeout_s" in error.message) == (422, True)


def test_whole_matrices_that_are_too_large_are_refused_unmade() -> None:
    """A merge that stays in factors makes no such matrix, whatever the size of the layer."""
    config = read_config(LORA, Reasons())
    assert config is not None
    parts = [MergeInput(config, AdapterSpec(()), {}.__getitem__, 1.0)] * 2
    served = ServedModel(
        model="m", name="m", fingerprint="f", model_type="llama", vocab_size=10, max_model_len=10,
        sites=[SiteShape("wide", 1 << 20, 1 << 20)],
    )  # fmt: skip
    layers = [("wide", [LoraWeights("wide", 8, 1.0, "a", "b")] * 2)]
    for strategy in STRATEGIES:
        merge = Merge(adapters=[b"1", b"2"], weights=[0.5, 0.5], strategy=strategy, density=0.5)
        for max_bytes, reason in ((1 << 30, "bytes of memory"), (1 << 60, "merge_timeout_s")):
            merger = Merger(merge, parts, MergeWatch(3600.0), max_bytes)
            if not strategy.endswith("_svd"):
                merger.check_cost(layers, served)
                continue
            with pytest.raises(AdapterRefused, match=reason):
                merger.check_cost(layers, served)


def rename(weights: Path) -> None:
    """Rename the tensors as in a multimodal wrapper."""
    found = load_file(weights)
    save_file({name.replace(".layers.", ".language_model.layers."): tensor for name, tensor in found.items()}, weights)


def test_what_cannot_be_merged_is_refused_with_the_reason(tmp_path: Path) -> None:
    options = {
        "a": {}, "wide": {"r": 9}, "dora": {"use_dora": True}, "pattern": {"target_modules": ".*q_proj"}, "named": {}
    }  # fmt: skip
    merging = Merging(LLAMA, {"a": {}}, tmp_path)
    for name, fields in options.items():
        make_adapter(Kind(LLAMA, fields), tmp_path / f"{name}2")
        merging.folders[digest_of(name)] = tmp_path / f"{name}2"
    for name in ("loha", "ia3"):
        make_adapter(CASES[name], tmp_path / f"{name}2")
        merging.folders[digest_of(name)] = tmp_path / f"{name}2"
    prompt = prompts(1, TINY_VOCAB, (8,))[0]
    rename(tmp_path / "named2" / WEIGHTS_FILE)
    reasons = {
        "wide": "needs equal ranks; these have 4, 9: take cat or svd",
        "dora": "DoRA",
        "loha": "peft_type LOHA",
        "ia3": "peft_type IA3",
        "pattern": "patterns",
        "named": "names that are not",
    }
    for name, reason in reasons.items():
        digest = merge_digest(["a", name], [0.5, 0.5])
        error = refusal(merging.engine, greedy_request(name, digest, prompt, 3))
        assert reason in error.message
        assert error.status in (400, 422)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"adapters": [], "weights": []}, "from 1 to 8"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"strategy": "dare_ties", "density": 0.0}, "density is 0"),
        ({"strategy": "cat", "arithmetic": "lorax"}, "LoRAX has no"),
    ],
)
def test_nonsense_is_no_merge(fields: dict[str, Any], reason: str) -> None:
    good = Merge(adapters=[b"1", b"2"], weights=[0.5, 0.5])
    check_merge(good)
    with pytest.raises(BadRequest, match=reason):
        check_merge(msgspec.structs.replace(good, **fields))
    for digest in ("merge-", "merge-%%%", "merge-AAAA"):
        with pytest.raises(BadRequest, match="is not a merge of adapters"):
            merge_of(digest)
