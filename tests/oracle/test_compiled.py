"""Layers under torch.compile give Hugging Face's and PEFT's tokens, from one graph for all layers and mixes."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
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


SCRIPT = """
import os, signal, sys, torch
from types import SimpleNamespace
from gpu_worker.model.compiled import CompiledLayer, compiling

layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
for number, parameter in enumerate(layer.parameters()):
    torch.nn.init.constant_(parameter, 0.5 + number)
compiled = CompiledLayer(layer, SimpleNamespace(extras=(), has_expert_rows=False))
x = torch.ones(3, 4)
with torch.inference_mode(), compiling():
    print(compiled.forward(x).tolist() == layer.forward(x).tolist(), os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
    if sys.argv[1:] == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1:] == ["waits"]:
        input()
"""


def test_code_that_a_killed_worker_left_half_compiled_is_compiled_again(tmp_path: Path) -> None:
    """The cache is in a folder of this user: one below /tmp may be another user's."""
    ours = {"LORAFLEET_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    given = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}

    def start(*args: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-W", "ignore", "-c", SCRIPT, *args], subprocess.PIPE
        return subprocess.Popen(command, env=given | ours, text=True, stdin=pipe, stdout=pipe, stderr=pipe)

    def run(*args: str) -> tuple[str, str]:
        with start(*args) as process:
            return process.communicate()

    right = f"True {tmp_path / 'inductor' / '0'}\n"
    assert run("killed")[0] == right
    built = [path for path in tmp_path.rglob("*.so") if path.stat().st_size > 0]
    assert built
    for path in built:
        os.truncate(path, 0)
    told, warned = run()
    assert told == right
    assert "is from a process that ended meanwhile" in warned
    assert all(path.stat().st_size > 0 for path in built)
    before = {path: path.stat().st_mtime_ns for path in built}
    with start("waits") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == right
        assert run()[0] == f"True {tmp_path / 'inductor' / '1'}\n"  # another process never uses the same folder
        assert first.communicate("\n")[0] == ""
    assert {path: path.stat().st_mtime_ns for path in built} == before, "the cache was not used"
    assert sorted(path.name for path in (tmp_path / "inductor").iterdir()) == ["0", "0.lock", "1", "1.lock"]
