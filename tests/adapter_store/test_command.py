"""`lorafleet adapter` as users run it, on folders, with and without a base model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors, write_adapter
from helpers.other_formats import peft_pairs, write_gguf, write_mlx
from msgspec import structs
from safetensors.numpy import load_file

from adapter_store.command import run
from gpu_worker.describe import describe
from lorafleet.__main__ import main
from lorafleet.operate.adapters import add_arguments
from lorafleet.shared.parser import Parser
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.texts.tokenizer_json import parts_of
from protocol.wire.messages import ServedModel, SiteShape

MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


@pytest.fixture(scope="module")
def described(base: str) -> ServedModel:
    """Return the base's description from a process with torch; the first test runs that process itself."""
    return describe(base)


def adapter(described: ServedModel, *words: str) -> int:
    """Run a command with an existing description of the base; return its exit code."""
    parser = Parser()
    add_arguments(parser)
    return run(parser.parse_args([*words, "--base", "described"]), lambda _: described)


@pytest.mark.thorough
def test_check_shows_what_takes_effect(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_adapter(tmp_path / "a", alpha_pattern={"v_proj": 2}))
    assert main(["adapters", "check", folder, "--base", base]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.*.self_attn.q_proj", "2", "LoRA", "4", "2", "yes"] in lines
    assert ["model.layers.*.self_attn.v_proj", "2", "LoRA", "4", "0.5", "yes"] in lines
    assert main(["adapters", "check", folder]) == 0
    assert "Without --base" in capsys.readouterr().out


def test_check_says_what_is_mapped_and_what_is_zero(
    tmp_path: Path, described: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "a")
    tensors = {
        name.replace("model.layers", "model.language_model.layers"): np.zeros_like(value) if "q_proj" in name else value
        for name, value in lora_tensors().items()
    }
    (folder / WEIGHTS_FILE).write_bytes(safetensors(tensors))
    assert adapter(described, "check", str(folder)) == 0
    out = capsys.readouterr().out
    assert "mapped: model.language_model.* → model.*" in out
    assert "no: it adds zero" in out
    (folder / WEIGHTS_FILE).write_bytes(safetensors({name: np.zeros_like(value) for name, value in tensors.items()}))
    assert adapter(described, "check", str(folder)) == 1
    assert "no effect" in capsys.readouterr().out


def test_check_shows_and_refuses_lora_on_a_layer_that_never_runs(
    tmp_path: Path, described: ServedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    site = SiteShape("model.layers.0.mamba.dt_proj", 4, 16)
    with_idle = structs.replace(described, idle=[site])
    for value, code in ((0.0, 0), (1.0, 1)):
        tensors = lora_tensors(sites=[*BASE.sites, site])
        tensors[f"base_model.model.{site.name}.lora_B.weight"] = np.full((16, 4), value)
        folder = write_adapter(tmp_path / f"a{code}", target_modules=["q_proj", "v_proj", "dt_proj"])
        (folder / WEIGHTS_FILE).write_bytes(safetensors(tensors))
        assert adapter(with_idle, "check", str(folder)) == code
        told = capsys.readouterr()
        if value:
            assert (
                f"must be zero here, since the model does not run this layer on every token: {site.name}"
                in told.err + told.out
            )
        else:
            row = next(line for line in told.out.splitlines() if "mamba.dt_proj" in line)
            assert "zero LoRA, on a layer not run" in row
            assert "no: it adds zero" in row


def test_check_gives_every_reason(tmp_path: Path, described: ServedModel, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_adapter(tmp_path / "a", target_modules=["q_proj", "o_proj"], use_qalora=True)
    assert adapter(described, "check", str(folder)) == 1
    out = capsys.readouterr().out
    for part in ("use_qalora", "does not target", "missing for targeted layers"):
        assert part in out


def test_check_compares_the_tokenizer(
    tmp_path: Path, described: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    file = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
    served = structs.replace(described, tokenizer=parts_of(json.dumps(file)))
    folder = write_adapter(tmp_path / "a")
    for merges, code in ((["a b"], 0), ([], 1)):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {**file["model"], "merges": merges}}))
        assert adapter(served, "check", str(folder)) == code
    assert "differs from the base model's in its merges" in capsys.readouterr().out


def test_wrong_usage_is_told(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    folder = str(write_adapter(tmp_path / "a"))
    other, loha = (str(write_adapter(tmp_path / kind, peft_type=kind)) for kind in ("C3A", "LOHA"))
    for words, reason in (
        (["check", str(tmp_path / "nowhere")], "is not a folder"),
        (["check", str(tmp_path / "empty")], "has neither"),
        (["check", folder, "--base", str(tmp_path / "empty")], "no config.json"),
        (["convert", folder, str(tmp_path / "b")], "already"),
        (["convert", folder, str(tmp_path / "b"), "--rank", "auto"], "already"),
        (["convert", other, str(tmp_path / "b")], "of kind C3A; --rank auto approximates it"),
        (["convert", other, str(tmp_path / "b"), "--rank", "auto"], "needs the weights of its base model"),
        (["check", loha], "needs its base model: --base"),
    ):
        assert main(["adapters", *words]) == 2
        assert reason in capsys.readouterr().err


def test_mlx_is_converted(tmp_path: Path, described: ServedModel, capsys: pytest.CaptureFixture[str]) -> None:
    peft = write_adapter(tmp_path / "peft")
    source, target = write_mlx(peft, tmp_path / "mlx", scale=20.0), tmp_path / "out"
    assert adapter(described, "check", str(source)) == 0
    assert "adapters.safetensors: read as" in capsys.readouterr().out
    assert main(["adapters", "convert", str(source), str(target)]) == 0
    assert "digest" in capsys.readouterr().out
    found, expected = load_file(target / WEIGHTS_FILE), load_file(peft / WEIGHTS_FILE)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert json.loads((target / CONFIG_FILE).read_text())["lora_alpha"] == 80.0
    assert adapter(described, "check", str(target)) == 0
    assert main(["adapters", "convert", str(source), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_gguf_is_converted_for_a_base(
    tmp_path: Path, described: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = write_adapter(tmp_path / "peft")
    write_gguf(peft_pairs(peft), tmp_path / "cpp" / "lora.gguf", "llama", 8.0, heads=(2, 2))
    source, target = str(tmp_path / "cpp"), tmp_path / "out"
    assert main(["adapters", "convert", source, str(target)]) == 2
    assert "--base" in capsys.readouterr().err
    assert adapter(described, "convert", source, str(target)) == 0
    found, expected = load_file(target / WEIGHTS_FILE), load_file(peft / WEIGHTS_FILE)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert json.loads((target / CONFIG_FILE).read_text())["lora_alpha"] == lora_config()["lora_alpha"]
