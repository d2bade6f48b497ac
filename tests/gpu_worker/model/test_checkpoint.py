"""An unusable model folder is refused with one line that names the fault."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.factories import LABELS, make_tiny_encoder
from oracle.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from gpu_worker.loading.checkpoint import read_config, read_eos_ids, read_model, task_of
from gpu_worker.service.program import serve
from gpu_worker.tasks.pooling import Pooling, read_pooling
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_good_folder_is_read_whole(folder: Path) -> None:
    model = read_model(folder, CPU, torch.float32)
    assert torch.equal(model.get_parameter("lm_head.weight"), tiny_model("llama").get_parameter("lm_head.weight"))
    assert not model.training
    assert read_eos_ids(folder, model.config) == {2}


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "not a readable model config"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a readable model config"),
    "no type": (lambda folder: edit_config(folder, model_type=None), "model type None is not known"),
    "unknown": (lambda folder: edit_config(folder, model_type="llama9"), "model type 'llama9' is not known to transf"),
    "no causal LM": (lambda folder: edit_config(folder, model_type="t5"), "model type t5 is not a causal language"),
    "bad field": (lambda folder: edit_config(folder, hidden_size="big"), "not a valid llama config"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*no file named"),
    "truncated": (truncate, "cannot be loaded: .*deserializing"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 64), "cannot be loaded: "),
    "missing tensors": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "lack 1 of the model's tensors: model.norm.weight",
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})),
        "have other shapes for 1 of the model's tensors: model.norm.weight",
    ),
    "unknown quantisation": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "origami"}),
        "quantised with origami, unknown to transformers",
    ),
    "a library that is missing": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "aqlm"}),
        "quantised with aqlm, cannot be loaded: .*aqlm",
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_what_is_wrong_is_said_in_one_line(folder: Path, how: str) -> None:
    breaks, said = BREAK[how]
    breaks(folder)
    with pytest.raises(BadRequest, match=said) as refusal:
        read_model(folder, CPU, torch.float32)
    assert "\n" not in refusal.value.message


def test_a_bad_generation_config_is_named(folder: Path) -> None:
    model = read_model(folder, CPU, torch.float32)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(BadRequest, match=r"generation_config\.json is not readable"):
        read_eos_ids(folder, model.config)


def test_an_encoder_is_read_for_what_it_was_made_for(tmp_path: Path) -> None:
    embedder = make_tiny_encoder(tmp_path / "embedder")
    assert task_of(read_config(embedder)) == "embed"
    model: Any = read_model(embedder, CPU, torch.float32)
    assert model.pooler is None
    edit_config(embedder, architectures=["BertForMaskedLM"])  # as in most checkpoints
    assert task_of(read_config(embedder)) == "embed"
    edit_config(embedder, architectures=["BertForSequenceClassification"])
    assert task_of(read_config(embedder)) == "score"
    with pytest.raises(BadRequest, match=r"lack 2 of the model's tensors: classifier\.bias, classifier\.weight"):
        read_model(embedder, CPU, torch.float32)
    edit_config(embedder, architectures=["BertForQuestionAnswering"])
    with pytest.raises(BadRequest, match="BertForQuestionAnswering is not served: of encoders"):
        read_model(embedder, CPU, torch.float32)
    edit_config(embedder, architectures=["BertLMHeadModel"], is_decoder=True)
    assert task_of(read_config(embedder)) == "generate"
    tagger = make_tiny_encoder(tmp_path / "tagger", labels=LABELS)
    assert task_of(read_config(tagger)) == "classify"
    assert read_model(tagger, CPU, torch.float32).config.num_labels == len(LABELS)


TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}


@pytest.mark.parametrize(
    ("modules", "config", "expected"),
    [
        (None, {}, Pooling("cls")),
        ([TRANSFORMER, POOLING, NORMALIZE], MEAN, Pooling("mean", unit_length=True)),
        ([TRANSFORMER, POOLING], {"pooling_mode_cls_token": True}, Pooling("cls")),
        ([TRANSFORMER, POOLING], {"pooling_mode": "lasttoken"}, Pooling("lasttoken")),
        ([TRANSFORMER, POOLING], {**MEAN, "pooling_mode_max_tokens": True}, "pooling by mean and max is not served"),
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_sqrt_len_tokens": True}, "by mean_sqrt_len is not served"),
        ([TRANSFORMER, POOLING], {}, "pooling by nothing is not served"),
        ([TRANSFORMER, POOLING, DENSE], MEAN, "has Transformer, Pooling, Dense; what is served is"),
        ([{**TRANSFORMER, "path": "0_Transformer"}, POOLING], MEAN, "has its Transformer in 0_Transformer"),
    ],
)
def test_pooling_is_what_sentence_transformers_files_say(
    tmp_path: Path, modules: list[dict[str, str]] | None, config: dict[str, object], expected: Pooling | str
) -> None:
    if modules is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    if isinstance(expected, str):
        with pytest.raises(BadRequest, match=expected):
            read_pooling(tmp_path)
    else:
        assert read_pooling(tmp_path) == expected


async def test_a_worker_leaves_with_the_refusal(folder: Path, bus: Bus) -> None:
    """The command line turns the refusal into exit code 2, which tells `up` not to restart the worker."""
    truncate(folder)
    settings = Settings(redis_url=bus.url, model=str(folder), device="cpu")
    with pytest.raises(BadRequest, match="cannot be loaded"):
        await serve(settings, asyncio.Event())
