"""`lorafleet profile` as a user runs it, on a tiny model: phases add up to the total, and operations have names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.factories import make_adapter, make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kernels import cpu
from lorafleet.__main__ import main
from protocol.metrics.series import PHASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    make_tiny_model(folder / "model")
    for seed, name in enumerate(("one", "two")):
        make_adapter(folder / "adapters" / name, folder / "model", seed=seed)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Restore the logging of pytest, which the command replaces with its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def lorafleet_profile(folder: Path, own_logging: None) -> Any:
    sizes = ["--kv-cache-bytes", str(16 << 20), "--adapter-pool-bytes", str(16 << 20), "--dtype", "float32"]
    return lambda *words: main(["profile", str(folder / "model"), "--device", "cpu", *sizes, *words])


def test_phases_and_operations_of_every_case_are_measured_and_written(
    folder: Path, lorafleet_profile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--adapters", str(folder / "adapters"), "--sequences", "1,3", "--steps", "4", "--prompt-tokens", "20"]
    assert lorafleet_profile(*flags, "--out", str(tmp_path / "p.json"), "--trace", str(tmp_path / "t.json")) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["adapters"] == ["one", "two"]
    assert (found["num_layers"], found["num_stacked"]) == (2, 2 if cpu.load() else 0)
    cases = {(case["kind"], case["num_sequences"]): case for case in found["cases"]}
    assert cases.keys() == {("decode", 1), ("prefill", 1), ("decode", 3), ("prefill", 3)}
    for (kind, num_sequences), case in cases.items():
        assert case["tokens"] == num_sequences * (1 if kind == "decode" else 20)
        assert case["num_adapters"] == min(num_sequences, 2)
        assert case["num_steps"] == 4
        assert case["phases_ms"].keys() == set(PHASES)
        idle = {name for name, ms in case["phases_ms"].items() if not ms}
        assert idle == {"draft"}, "there is no draft model"
        assert case["step_ms"] == pytest.approx(sum(case["phases_ms"].values()) - case["phases_ms"]["publish"])
        operations = {operation["name"]: operation for operation in case["operations"]}
        if cpu.load():
            calls = {name: operations[name]["calls"] for name in ("linear", "lora", "attention", "rotary", "norm")}
            assert calls == {"linear": 9, "lora": 9, "attention": 2, "rotary": 2, "norm": 5}
        assert 0 < sum(operation["ms"] for operation in case["operations"]) <= case["forward_ms"]
        events = json.loads((tmp_path / f"t-{kind}-{num_sequences}.json").read_text())["traceEvents"]
        assert any(event.get("name") == "lorafleet: forward" for event in events)
    shown = capsys.readouterr().out
    assert "decode, 3 sequences, 2 adapters" in shown
    assert "between them" in shown


def test_layers_with_experts_are_calls_of_their_own(own_logging: None, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    fields = AutoConfig.from_pretrained(tmp_path / "model").to_dict() | {"num_local_experts": 4, "head_dim": 16}
    del fields["model_type"], fields["architectures"]
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **fields)).save_pretrained(tmp_path / "model")
    sizes = ["--device", "cpu", "--kv-cache-bytes", str(16 << 20), "--dtype", "bfloat16", "--sequences", "1"]
    assert main(["profile", str(tmp_path / "model"), *sizes, "--steps", "2", "--out", str(tmp_path / "p.json")]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["num_layers"], found["num_stacked"]) == (2, 0)
    if cpu.load():
        assert all("experts" in [operation["name"] for operation in case["operations"]] for case in found["cases"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sequences", "65"], "65 is over max_num_seqs, 64"),
        (["--prompt-tokens", "510"], "max_model_len is 512"),
        (["--kv-cache-bytes", "300000", "--prompt-tokens", "300"], "kv_cache_bytes holds 36"),
        (["--adapters", "{folder}/empty"], "no sub-folder of"),
        (["--adapters", "{folder}/adapters", "--adapter-pool-bytes", "160000"], "holds 1 of the 2 adapters"),
    ],
)
def test_what_cannot_be_measured_is_said(
    folder: Path, lorafleet_profile: Any, words: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [word.format(folder=folder) for word in words]
    assert lorafleet_profile("--sequences", "2", *given, "--out", str(tmp_path / "p.json")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()
