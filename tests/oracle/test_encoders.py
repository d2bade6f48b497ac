"""Encoders: mixed batches give the vectors and label logits of transformers and PEFT, whatever PEFT saves for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from oracle.peft_oracle import TINY_VOCAB, oracle_settings, prompts, saved_files, vary_norms, warm
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedModel

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import build_encoder_engine
from gpu_worker.encoder.engine import EncoderEngine
from gpu_worker.encoder.model import prepare_encoder
from gpu_worker.planning.batcher import MAX_SKIPS
from gpu_worker.planning.request import EngineRequest, TokenOutput
from gpu_worker.tasks.pooling import Pooling
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling, Task

MAX_DIFFERENCE = 1e-4
MIN_EFFECT = 100 * MAX_DIFFERENCE
NUM_LABELS = 5
LENGTHS = (3, 17, 30, 45, 1)
SIZES = {
    "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
    },
}  # fmt: skip
ATTENTION = {
    "bert": ["query", "value"], "roberta": ["key", "value"], "distilbert": ["q_lin", "out_lin"],
    "albert": ["query", "dense"], "modernbert": ["Wqkv", "Wo"], "deberta-v2": ["query_proj", "value_proj"],
    "mpnet": ["q", "v"],
}  # fmt: skip
"""Per type: names of linear layers that occur only in its layers."""

WITHOUT_POOLER = ("distilbert", "modernbert", "deberta-v2")
WORDS = {"bert": "word_embeddings", "distilbert": "word_embeddings"}
NORMS = {"bert": "embeddings.LayerNorm", "distilbert": "output_layer_norm"}


def make_encoder(model_type: str, task: Task) -> PreTrainedModel:
    """Return a tiny random encoder in fp32."""
    config = type(AutoConfig.for_model(model_type))(**SIZES | MORE.get(model_type, {}))
    options = {} if task == "classify" or model_type in WITHOUT_POOLER else {"add_pooling_layer": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if task == "classify":
            config.num_labels = NUM_LABELS
            model = AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
        else:
            model = AutoModel.from_config(config, attn_implementation="eager", **options)
        vary_norms(model.eval())
    return model


def adapters_of(model_type: str, task: Task) -> dict[str, dict[str, Any]]:
    """Return adapters' LoraConfig fields by name: plain adapters, and all else that PEFT saves for such models."""
    attention = ATTENTION[model_type]
    found: dict[str, dict[str, Any]] = {
        "few": {"r": 3, "target_modules": attention[:1]},
        "all": {"r": 5, "target_modules": "all-linear", "use_rslora": True, "lora_alpha": 4},
    }
    if task == "classify":  # PEFT saves the whole head by default
        found["whole head"] = {"r": 4, "target_modules": attention, "modules_to_save": ["classifier"]}
    if model_type in WORDS:
        found["dora"] = {"r": 4, "target_modules": attention, "use_dora": True}
        found["words"] = {"r": 4, "target_modules": [*attention, WORDS[model_type]]}
        found["norms"] = {"r": 4, "target_modules": attention, "modules_to_save": [NORMS[model_type]]}
    return found


@dataclass
class Oracle:
    """An encoder and its adapters under PEFT, one text at a time."""

    base: PreTrainedModel
    task: Task
    configs: dict[str, dict[str, Any]]
    files: dict[str, FetchedAdapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.untouched = copy.deepcopy(self.base)
        self.peft: Any = None
        kind = "TOKEN_CLS" if self.task == "classify" else "FEATURE_EXTRACTION"
        generator = torch.Generator().manual_seed(7)
        for name, fields in self.configs.items():
            options: dict[str, Any] = {"lora_alpha": 16, **fields}
            config = LoraConfig(task_type=kind, **options)
            if self.peft is None:
                self.peft = get_peft_model(self.base, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
            with torch.no_grad():
                for parameter_name, parameter in self.peft.named_parameters():
                    if f".{name}." in parameter_name or parameter_name.endswith(f".{name}"):
                        noise = torch.randn(parameter.shape, generator=generator)
                        is_lora = "lora_" in parameter_name and "magnitude" not in parameter_name
                        parameter.copy_(0.15 * noise if is_lora else parameter + 0.2 * noise)
            self.files[name] = saved_files(self.peft, config, adapter_name=name)
        self.peft.eval()

    @contextmanager
    def _under(self, name: str) -> Iterator[PeftModel]:
        if name:
            self.peft.set_adapter(name)
            yield self.peft
        else:
            with self.peft.disable_adapter():
                yield self.peft

    def says(self, name: str, text: np.ndarray) -> Tensor:
        """Return the hidden states, or the logits, [T, …] of a text under one adapter."""
        ids = torch.from_numpy(text.astype(np.int64))[None]
        with torch.inference_mode(), self._under(name) as model:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return (out.logits if self.task == "classify" else out.last_hidden_state)[0]

    def engine(self, pooling: Pooling | None = None, **settings: Any) -> EncoderEngine:
        model = prepare_encoder(copy.deepcopy(self.untouched), self.task, None, pooling)
        return build_encoder_engine(model, oracle_settings(**settings), self.files.__getitem__)[0]


def request(rid: str, name: str, text: np.ndarray, task: Task, **fields: Any) -> EngineRequest:
    return EngineRequest(rid, 1, name, text.astype(np.int32), Sampling(), 0, task=task, **fields)


def ask(engine: EncoderEngine, requests: Sequence[EngineRequest]) -> dict[str, TokenOutput]:
    """Load the adapters into the pool, then run requests to their ends."""
    warm(engine, {request.digest for request in requests})
    for one in requests:
        engine.add(one)
    found: dict[str, TokenOutput] = {}
    while engine.has_work:
        found |= {output.rid: output for output in engine.step()}
    engine.check_integrity()
    return found


def floats(output: TokenOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.array(output.ids, np.int32).view(np.float32)


@pytest.mark.parametrize(
    "case",
    examples.some(
        product(ATTENTION, ("embed", "classify")),
        ("bert", "classify"),
        ("modernbert", "embed"),
        ("deberta-v2", "embed"),
    ),
    ids=str,
)
def test_a_mixed_batch_is_what_peft_computes_alone(case: tuple[str, Task]) -> None:
    model_type, task = case
    oracle = Oracle(make_encoder(model_type, task), task, adapters_of(model_type, task))
    engine = oracle.engine(Pooling("mean"), max_step_tokens=1024)
    texts = prompts(len(LENGTHS), TINY_VOCAB, LENGTHS)
    texts[1][4] = SIZES["pad_token_id"]  # RoBERTa's positions skip padding tokens
    asked = [request(f"{name}/{i}", name, text, task) for i, text in enumerate(texts) for name in ("", *oracle.files)]
    logits: list[Tensor] = []
    if task == "classify":
        head = engine.model.module.get_submodule("classifier")
        head.register_forward_hook(lambda _, args, out: logits.append(out[0].clone()))
    found = ask(engine, asked)
    steps = torch.cat(logits).split([len(one.prompt) for one in asked]) if logits else []
    effects: dict[str, float] = dict.fromkeys(oracle.files, 0.0)
    for i, one in enumerate(asked):
        said, base = oracle.says(one.digest, one.prompt), oracle.says("", one.prompt)
        if one.digest:
            effects[one.digest] = max(effects[one.digest], (said - base).abs().max().item())
        if task == "embed":
            vector = torch.from_numpy(floats(found[one.rid]))
            assert (vector - said.mean(0)).abs().max() < MAX_DIFFERENCE, one.rid
        else:
            assert (steps[i] - said).abs().max() < MAX_DIFFERENCE, one.rid
            scores, labels = said.softmax(-1).max(-1)
            pairs = np.array(found[one.rid].ids, np.int32).reshape(-1, 2)
            assert pairs[:, 0].tolist() == labels.tolist()
            assert np.abs(pairs[:, 1].copy().view(np.float32) - scores.numpy()).max() < MAX_DIFFERENCE
    assert min(effects.values()) > MIN_EFFECT, effects
    assert engine.counters.num_steps == 1


def test_pooling_scales_and_steps_that_are_too_small_for_all() -> None:
    oracle = Oracle(make_encoder("bert", "embed"), "embed", {"few": {"r": 3, "target_modules": ["query"]}})
    texts = prompts(4, TINY_VOCAB, LENGTHS)
    for pooling, pooled in (
        (Pooling(), lambda hidden: hidden[0]),
        (Pooling("max", unit_length=True), lambda hidden: torch.nn.functional.normalize(hidden.amax(0), dim=0)),
        (Pooling("lasttoken"), lambda hidden: hidden[-1]),
    ):
        engine = oracle.engine(pooling, max_step_tokens=20, max_num_seqs=2)
        found = ask(engine, [request(str(i), "few" if i % 2 else "", text, "embed") for i, text in enumerate(texts)])
        for i, text in enumerate(texts):
            expected = pooled(oracle.says("few" if i % 2 else "", text))
            assert (torch.from_numpy(floats(found[str(i)])) - expected).abs().max() < MAX_DIFFERENCE
        assert engine.counters.num_steps == 3  # 3 + 17 tokens in one step, and two texts longer than a step of 20
    half = ask(engine, [request("half", "few", texts[1], "embed", lora_scale=0.5)])["half"]
    whole, base = oracle.says("few", texts[1])[-1], oracle.says("", texts[1])[-1]
    vector = torch.from_numpy(floats(half))
    assert (vector - whole).abs().max() > MIN_EFFECT / 10
    assert (vector - base).abs().max() > MIN_EFFECT / 10


def test_what_cannot_be_computed_is_told_and_nothing_else_suffers() -> None:
    oracle = Oracle(make_encoder("bert", "embed"), "embed", {"few": {"r": 3, "target_modules": ["query"]}})
    engine = oracle.engine()
    good, long = prompts(2, TINY_VOCAB, (9, 65))
    wrong = np.array([3, TINY_VOCAB], np.int32)
    found = ask(
        engine,
        [
            request("good", "few", good, "embed"),
            request("long", "", long, "embed"),
            request("wrong", "few", wrong, "embed"),
            request("empty", "", good[:0], "embed"),
            request("labels", "", good, "classify"),
        ],
    )
    told = {rid: output.error.message for rid, output in found.items() if output.error is not None}
    assert told == {
        "long": "the text has 65 tokens, this model takes at most 64",
        "wrong": f"the text holds token ids outside 0 … {TINY_VOCAB - 1}",
        "empty": "the text is empty",
        "labels": "this worker's model does embed; it does not classify",
    }
    assert len(found["good"].ids) == 64
    engine.add(request("again", "", good, "embed", output=[1, 2]))  # its log is complete already
    [again] = engine.step()
    assert (again.seq0, again.ids, again.finish) == (2, [], "stop")
    engine.add(request("gone", "", good, "embed"))
    engine.cancel("gone")
    engine.add(request("handed back", "", good, "embed"))
    assert engine.hand_over() == ["handed back"]
    assert engine.step() == []


def test_a_decoder_is_no_encoder() -> None:
    model = make_encoder("bert", "embed")
    model.config.is_decoder = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True  # pyright: ignore[reportArgumentType] - a module's attributes may be anything
    with pytest.raises(BadRequest, match="attention in one direction"):
        prepare_encoder(model, "embed", None)


def test_texts_that_yield_come_after_others_and_never_wait_for_ever() -> None:
    oracle = Oracle(make_encoder("bert", "embed"), "embed", {"few": {"r": 3, "target_modules": ["query"]}})
    engine = oracle.engine(Pooling("mean"), max_step_tokens=100, max_slowdown=2.0)
    [short, long] = prompts(2, TINY_VOCAB, (10, 40))

    def step() -> list[str]:
        return sorted(output.rid for output in engine.step())

    for number in range(6):
        engine.add(request(f"flood-{number}", "", long, "embed", yields=True))
    assert step() == ["flood-0", "flood-1"]  # alone, the flood may fill a step
    engine.add(request("quiet-0", "", short, "embed"))
    assert step() == ["quiet-0"]  # a text of the flood would make this step five times as long
    for number in range(1, 5):
        engine.add(request(f"quiet-{number}", "", short, "embed"))
    assert step() == ["flood-2", *(f"quiet-{number}" for number in range(1, 5))]  # the step may be twice as long
    num_steps, last = 2, list[str]()  # steps in which the flood's next text was passed over
    while "flood-3" in engine._requests:
        engine.add(request(f"quiet-{num_steps + 3}", "", short, "embed"))
        last = step()
        num_steps += 1
    assert num_steps == MAX_SKIPS + 2
    assert last == ["flood-3", "flood-4"]  # both have waited equally long, longer than the newest text
    assert step() == ["flood-5", f"quiet-{num_steps + 2}"]
    assert not engine._num_skips


def test_texts_of_batches_come_after_all_others_however_long_they_wait() -> None:
    oracle = Oracle(make_encoder("bert", "embed"), "embed", {"few": {"r": 3, "target_modules": ["query"]}})
    engine = oracle.engine(Pooling("mean"), max_step_tokens=100, max_slowdown=2.0, max_batch_slowdown=1.1)
    [short, long] = prompts(2, TINY_VOCAB, (10, 40))
    engine.add(request("line", "", short, "embed", batch=True))
    for number in range(MAX_SKIPS + 2):
        engine.add(request(f"flood-{number}", "", long, "embed", yields=True))
        assert [output.rid for output in engine.step()] == [f"flood-{number}"], "50 tokens are more than 1.1 x 40"
    assert [output.rid for output in engine.step()] == ["line"]
