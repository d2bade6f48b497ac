"""Layers under torch.compile give Hugging Face's and PEFT's tokens, from one graph for all layers and mixes."""

from __future__ import annotations

import copy
import importlib
from typing import NoReturn

import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Oracle, ask, greedy_request, oracle_settings, prompts, warm

from gpu_worker.build import build_engine
from gpu_worker.model.compiled import decoder_layers
from gpu_worker.model.prepare import prepare_model
from protocol.wire.errors import BadRequest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # from torch's compiler

NUM_TOKENS = 12
SETTINGS = oracle_settings(compile=True, max_step_tokens=64)


def test_every_mix_runs_through_the_same_two_graphs(tiny: Oracle) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = prepare_model(copy.deepcopy(tiny.untouched), frozenset(), None, compiled=True)
    assert len(decoder_layers(model.module)) == 2
    engine, _ = build_engine(model, SETTINGS, tiny.fetch, None)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, "one for a token, one for more"
    warm(engine, tiny.names)
    some = prompts(5, TINY_VOCAB)
    requests = [greedy_request(name, name, some[i % 5], NUM_TOKENS) for i, name in enumerate(tiny.names)]
    asked = ask(engine, requests)
    for i, name in enumerate(tiny.names):
        assert asked.ids[name] == tiny.greedy(name, some[i % 5], NUM_TOKENS), name
    assert len({tuple(ids) for ids in asked.ids.values()}) > 10
    assert asked.most_adapters_in_a_step > 8
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2, "a request made torch compile again"


def test_what_cannot_be_compiled_is_refused_at_start(tiny: Oracle) -> None:
    model = prepare_model(copy.deepcopy(tiny.untouched), frozenset(), None, compiled=True)

    def fails(*_: object, **__: object) -> NoReturn:
        raise importlib.import_module("torch._dynamo.exc").Unsupported("a thing it does not know")

    decoder_layers(model.module)[0].forward = fails
    with pytest.raises(BadRequest, match="a thing it does not know"):
        build_engine(model, SETTINGS, tiny.fetch, None)
