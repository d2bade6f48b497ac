"""LoRA on layers that the model does not run, or whose weights it reads without running them, as Jamba's `dt_proj`.

PEFT wraps such a layer and adds to its output, which nothing reads. So the LoRA there gets no gradient and stays zero,
and an adapter with it is served. If it is not zero, the merged and the unmerged adapter may differ in PEFT: it is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import examples
from oracle.adapters.peft_kinds import MAX_DIFFERENCE, Kind, check_exact, load, make_adapter, measure, train_adapter
from safetensors.torch import load_file, save_file

from peft_adapters.format import WEIGHTS_FILE

TARGETS: dict[str, Any] = {
    "jamba": "all-linear",
    "mamba": ["in_proj", "x_proj", "dt_proj"],  # PEFT refuses LoRA on its out_proj
    "falcon_mamba": ["in_proj", "x_proj", "dt_proj"],
    "bart": "all-linear",
    "mllama": "all-linear",
    "longcat_flash": "all-linear",
}
IDLE = {"bart": "encoder_attn.", "mllama": "layers.1.", "longcat_flash": "classifier."}
"""Part of the names of layers that do not run; `dt_proj` for the other types.

They are attention to an encoder or to images, and routers whose weights are read.
"""


def kind_on(model_type: str) -> Kind:
    return Kind((model_type, {"tiny": True}), {"target_modules": TARGETS[model_type]})


@pytest.mark.parametrize("model_type", examples.some(TARGETS, "jamba", "bart"))
def test_what_is_zero_is_served_and_the_rest_is_exact(model_type: str, tmp_path: Path) -> None:
    kind = kind_on(model_type)
    make_adapter(kind, tmp_path)
    file = tmp_path / WEIGHTS_FILE
    tensors = load_file(file)
    part = IDLE.get(model_type, "dt_proj.")
    idle = [name for name in tensors if part in name and "lora_B" in name]
    assert idle
    with pytest.raises(AssertionError, match=f"LoRA must be zero here.*{part}"):
        measure(kind, tmp_path)  # the requests in it end with this error
    save_file({name: tensor * (name not in idle) for name, tensor in tensors.items()}, file)
    check_exact(kind, tmp_path)


def test_training_leaves_it_zero_and_peft_has_two_answers_otherwise(tmp_path: Path) -> None:
    kind = kind_on("jamba")
    assert not train_adapter(kind, tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / WEIGHTS_FILE)
    assert not any(tensor.any() for name, tensor in trained.items() if "dt_proj.lora_B" in name)
    assert any(tensor.any() for name, tensor in trained.items() if "x_proj.lora_B" in name)
    other = Kind(kind.base, {"target_modules": ["dt_proj"]})
    make_adapter(other, tmp_path / "made")
    model: Any = load(other, tmp_path / "made")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        added = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        model.base_model.merge_adapter()
        merged = model(ids).logits
    assert torch.equal(added, base)
    assert (merged - base).abs().max() > 100 * MAX_DIFFERENCE
