"""The oracle of embeddings and scores: transformers' classes and PEFT, one text at a time; and folders of models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracle.conformance import LENGTHS, adapters_for
from oracle.peft_oracle import Asked, ask, oracle_settings, prompts, saved_files
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.loading.checkpoint import takes_positions
from gpu_worker.model.prepare import load_model, prepare_model
from gpu_worker.planning.request import EngineRequest
from protocol.wire.messages import Sampling, Task

MAX_DIFFERENCE = 1e-4
MIN_EFFECT = 100 * MAX_DIFFERENCE
Q_V = ("q_proj", "v_proj")


def classifier_of(model: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """Return a random sequence classifier that shares the decoder of a causal LM."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(num_labels)
        found: Any = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
        torch.nn.init.normal_(
            next(child for name, child in found.named_children() if name != found.base_model_prefix).weight
        )
    setattr(found, found.base_model_prefix, copy.deepcopy(getattr(model, model.base_model_prefix)))
    return found


@dataclass
class PooledOracle:
    """A causal LM, and adapters of all tasks by name; "" is the base. Each adapter is a PEFT model of its own."""

    base: PreTrainedModel
    models: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FetchedAdapter] = field(default_factory=dict)

    def add(self, name: str, kind: str, num_labels: int = 0, **fields: Any) -> None:
        """Make a random adapter. kind: PEFT's task type. num_labels: labels of a SEQ_CLS adapter."""
        untouched = copy.deepcopy(self.base)
        if num_labels:
            untouched = classifier_of(untouched, num_labels)
        elif kind == "FEATURE_EXTRACTION":
            untouched = getattr(untouched, untouched.base_model_prefix)
        options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(Q_V), **fields}
        config = LoraConfig(task_type=kind, **options)
        model: Any = get_peft_model(untouched, config)  # pyright: ignore[reportArgumentType]
        generator = torch.Generator().manual_seed(len(self.files))
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                if "lora_" in own and "magnitude" not in own:
                    parameter.normal_(0.0, 0.3, generator=generator)
                elif "magnitude" in own or "modules_to_save" in own:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.models[name] = model.eval()
        self.files[name] = saved_files(model, config)

    def hidden(self, name: str, text: np.ndarray) -> Tensor:
        """Return the hidden states [T, D] of a text under an adapter, computed alone."""
        model = self.models.get(name, self.base)
        inner = model.get_base_model() if name else model
        decoder = getattr(inner, inner.base_model_prefix, inner)
        with torch.inference_mode():
            return decoder(**self._inputs(text), use_cache=False).last_hidden_state[0]

    def scores(self, name: str, text: np.ndarray) -> Tensor:
        """Return the logits [labels] of PEFT's classifier for a text, computed alone."""
        with torch.inference_mode():
            return self.models[name](**self._inputs(text)).logits[0]

    def _inputs(self, text: np.ndarray) -> dict[str, Tensor]:
        ids = torch.from_numpy(text.astype(np.int64))[None]
        return {"input_ids": ids} | (
            {"position_ids": torch.arange(len(text))[None]} if takes_positions(self.base) else {}
        )

    def engine(self, **settings: Any) -> Engine:
        """Return an engine on a copy of the base, with these adapters."""
        model = prepare_model(copy.deepcopy(self.base), frozenset(), None)
        return build_engine(model, oracle_settings(**settings), self.files.__getitem__)[0]

    def engine_of(self, folder: Path, **settings: Any) -> Engine:
        """Return an engine on a model folder, with these adapters."""
        given = oracle_settings(**settings)
        model = load_model(folder, torch.device("cpu"), torch.float32, None, score_tokens=given.score_tokens)
        return build_engine(model, given, self.files.__getitem__)[0]


def request_for(task: Task, rid: str, name: str, text: np.ndarray, **fields: Any) -> EngineRequest:
    return EngineRequest(rid, 1, name, text.astype(np.int32), Sampling(), 0, task=task, **fields)


def numbers_of(asked: Asked, rid: str) -> np.ndarray:
    """Return the output values of a request that has ended without an error."""
    end = asked.finish[rid]
    assert end.finish == "stop", end.error
    return np.array(asked.ids[rid], "<i4").view("<f4")


def difference(got: np.ndarray, expected: Tensor) -> float:
    assert got.shape == tuple(expected.shape)
    return float(np.abs(got - expected.numpy()).max())


def conform_pooled(model: PreTrainedModel) -> None:
    """Compare an adapter's embeddings, and scores if the type has a classifier, with transformers and PEFT."""
    tried = prepare_model(copy.deepcopy(model), frozenset(), None)
    if tried.tasks.pooling is None:
        return
    oracle = PooledOracle(model)
    targets = list(adapters_for(model, tried.sites)["few"].targets)
    options = {"fan_in_fan_out": True} if any(site.kind == "conv1d" for site in tried.sites) else {}
    oracle.add("search", "CAUSAL_LM", target_modules=targets, **options)
    if tried.tasks.head_name:
        oracle.add("sorts", "SEQ_CLS", 3, target_modules=targets, **options)
    texts = prompts(3, model.config.get_text_config().vocab_size, LENGTHS)
    requests = [
        request_for("embed", f"e{i}{name}", name, text) for i, text in enumerate(texts) for name in ("", "search")
    ]
    scores = [request_for("score", f"s{i}", "sorts", text) for i, text in enumerate(texts) if "sorts" in oracle.files]
    asked = ask(oracle.engine(max_step_tokens=16, max_num_seqs=8), [*requests, *scores])
    for request in requests:
        expected = F.normalize(oracle.hidden(request.digest, request.prompt)[-1], dim=0)
        assert difference(numbers_of(asked, request.rid), expected) < MAX_DIFFERENCE
    for request in scores:
        assert difference(numbers_of(asked, request.rid), oracle.scores("sorts", request.prompt)) < MAX_DIFFERENCE
