"""The adapters that ship with the repository are small, portable, different from each other, and have an effect."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafleet.quickstart import HUB_MODEL_ID
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec, parse_config, parse_header, read_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(folder.name for folder in (EXAMPLES / "adapters").iterdir())


def read(name: str) -> AdapterSpec:
    folder = EXAMPLES / "adapters" / name
    weights = (folder / WEIGHTS_FILE).read_bytes()
    return read_adapter(parse_config((folder / CONFIG_FILE).read_bytes()), parse_header(weights, len(weights)), None)


@pytest.mark.parametrize("name", NAMES)
def test_adapter_is_served_small_and_portable(name: str) -> None:
    folder = EXAMPLES / "adapters" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    config = (folder / CONFIG_FILE).read_text()
    assert json.loads(config)["base_model_name_or_path"] == HUB_MODEL_ID
    assert '"/' not in config  # no path of the machine that trained the adapter
    assert len(read(name).sites) == 30 * len(read(name).modules)
    for tensor, weight in load_file(folder / WEIGHTS_FILE).items():
        assert torch.isfinite(weight).all()
        assert weight.abs().amax() > 0, tensor


def test_adapters_differ_in_rank_and_modules() -> None:
    specs = [read(name) for name in NAMES]
    assert len({spec.rank for spec in specs}) == len(specs) == 3
    assert len({tuple(spec.modules) for spec in specs}) == len(specs)


def test_every_adapter_has_its_training_answers() -> None:
    styles = json.loads((EXAMPLES / "styles.json").read_text())
    assert sorted(styles) == NAMES
    questions = [{pair["question"] for pair in pairs} for pairs in styles.values()]
    assert all(asked == questions[0] for asked in questions)
    for pair in styles["json"]:
        assert set(json.loads(pair["answer"])) == {"answer", "topic"}
