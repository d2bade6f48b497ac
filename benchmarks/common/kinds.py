"""Adapters of several kinds for a benchmark, made by PEFT."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, RoadConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "down_proj"]
KindOptions = tuple[type[PeftConfig], dict[str, Any]]
Groups = Mapping[str, Sequence[KindOptions]]
"""Group name -> its kinds of adapters, which are used in turn."""

LORA: KindOptions = (LoraConfig, {"r": 16})
IA3: KindOptions = (IA3Config, {"feedforward_modules": ["down_proj"]})
ROAD: KindOptions = (RoadConfig, {"group_size": 64})
OFT: KindOptions = (OFTConfig, {"oft_block_size": 32, "init_weights": False})


def make_kinds(model: Path, root: Path, groups: Groups, num: int) -> dict[str, list[str]]:
    """Write `num` adapters of each group on TARGETS, each with its own weights; return their names by group."""
    names: dict[str, list[str]] = {}
    base = AutoModelForCausalLM.from_pretrained(model)
    for group, (title, kinds) in enumerate(groups.items()):
        for index, (config, options) in zip(range(num), itertools.cycle(kinds)):
            name = f"group-{group}-{index}"
            names.setdefault(title, []).append(name)
            torch.manual_seed(index)
            fields = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted: Any = get_peft_model(base, config(**fields))
                with torch.no_grad():
                    for parameter in adapted.parameters():
                        if parameter.requires_grad:
                            parameter += 0.02 * torch.randn_like(parameter)
                adapted.save_pretrained(str(root / name))
                base = adapted.unload()
    return names
