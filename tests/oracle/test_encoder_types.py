"""Every encoder type named in docs/encoders.md computes what the untouched model does, packed or text by text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.test_encoders import MORE, SIZES
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification

from gpu_worker.encoder.model import prepare_encoder
from protocol.wire.messages import Task

PAGE = Path(__file__).resolve().parents[2] / "docs" / "encoders.md"
OTHER_SIZES: dict[str, dict[str, Any]] = MORE | {
    "flaubert": {"emb_dim": 64, "n_layers": 2, "n_heads": 4}, "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "squeezebert": {"embedding_size": 64},
    "mobilebert": {"true_hidden_size": 64, "intra_bottleneck_size": 64, "embedding_size": 64},
    "reformer": {
        "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"],
        "is_decoder": False, "attention_head_size": 16, "feed_forward_size": 96,
    },
}  # fmt: skip


def named(way: str) -> list[str]:
    """Return the types that the page lists under a way to run: packed, or text by text."""
    found = re.search(rf"  - {way}: (.*?)[;.]", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return [name.strip() for name in found[1].split(",")]


TYPES = [(name, way == "text by text") for way in ("packed", "text by text") for name in named(way)]


@pytest.mark.models
@pytest.mark.parametrize(("model_type", "apart"), TYPES)
def test_a_type_is_served_as_the_page_says(model_type: str, apart: bool) -> None:
    classes: dict[Task, Any] = {"score": AutoModelForSequenceClassification, "embed": AutoModel}
    for task, auto in classes.items():
        sizes: Any = SIZES | OTHER_SIZES.get(model_type, {}) | {"num_labels": 3}
        config = CONFIG_MAPPING[model_type](**sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = auto.from_config(config, attn_implementation="eager").eval()
        model = prepare_encoder(module, task, None)  # compares it with the untouched model
        assert (model.apart, bool(model.sites)) == (apart, True)
