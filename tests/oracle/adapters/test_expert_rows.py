"""LoRA on fused experts as rows of the adapter pool, added by one grouped operation, gives PEFT's results."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.adapters.expert_adapters import expert_adapters, stacks
from oracle.adapters.peft_kinds import (
    EXPERT_PARAMETERS,
    GPT_OSS,
    KINDS,
    MAX_DIFFERENCE,
    MIXTRAL,
    Kind,
    asked_prompts,
    make_adapter,
    make_engine,
    measure,
)
from oracle.conformance import conform, watch_logits
from oracle.models_table import read_table
from oracle.peft_oracle import Lora, Oracle, ask, greedy_request, prompts, refusal, warm
from oracle.recorders import WAITS, Rerun
from oracle.tiny_models import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_worker.adapters.expert_pool import EXPERT_SHARE, page_bytes
from gpu_worker.adapters.packing.expert_rows import expert_shapes, expert_sites
from gpu_worker.adapters.packing.packer import Packer
from gpu_worker.layers.apply_extras import AdaptableModule, TokenLayout
from gpu_worker.layers.expert_modules import GroupedExperts, find_grouped_experts
from gpu_worker.layers.extras import Extras
from gpu_worker.model.prepare import prepare_model

ALWAYS = {
    "mixtral", "qwen3_moe",
    "gpt_oss",  # transposed weights, biases, alternating gates and ups
    "nemotron_h",  # no gate, and layers with states
    "deepseek_v3",
    "longcat_flash",  # experts that compute nothing, in a form of its own
}  # fmt: skip
"""The types of a short run; `make test-models` runs the others."""

RUN_AGAIN = {"longcat_flash"}
"""Types whose expert modules do not map pairs of token and expert, and run a second time with other weights."""


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(one, marks=[] if one in ALWAYS else pytest.mark.models) for one in read_table("served")],
)
def test_experts_of_every_type_are_those_of_peft(model_type: str) -> None:
    model = tiny_model(model_type)
    if not stacks(prepare_model(copy.deepcopy(model), frozenset(), None)):
        return
    outcome = conform(model, expert_adapters)
    assert not outcome.refused
    # Some types have large logits, whose last digits differ by more, even without experts.
    assert outcome.difference <= MAX_DIFFERENCE * max(1, outcome.effect)
    assert outcome.effect >= 100 * MAX_DIFFERENCE
    assert bool(outcome.num_grouped) == (model_type not in RUN_AGAIN)


# ---------------------------------------------------------------- one type, closely


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    model = tiny_model("qwen3_moe")
    loras = expert_adapters(model, prepare_model(copy.deepcopy(model), frozenset(), None))
    return Oracle(model, loras | {"middle": Lora(7, (), loras["high"].options)}, scale=0.4)


def page_budget(oracle: Oracle, num_pages: int) -> int:
    """Return the adapter_extra_bytes that hold `num_pages` pages of each shape of experts."""
    tried = prepare_model(copy.deepcopy(oracle.untouched), frozenset(), None)
    sizes = [page_bytes(shape) for shape in expert_shapes(expert_sites(tried.adaptable.experts))]
    return int(num_pages * sum(sizes) / EXPERT_SHARE) + 1


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_mixed_batches_while_adapters_come_and_go(oracle: Oracle, kernels: str) -> None:
    """There is room for the largest adapter alone, or for two others: tokens and logits always equal PEFT's."""
    layers = len([name for name, _ in oracle.untouched.named_modules() if name.endswith(".experts")])
    engine = oracle.engine(
        kernels=kernels, max_step_tokens=24, max_num_seqs=8, adapter_extra_bytes=page_budget(oracle, 2 * layers)
    )
    assert engine.adapters.weights.experts.capacity == [2 * layers] * 2
    texts, names = prompts(4, 199, (5, 33, 20, 12)), [*oracle.names]
    wanted = [(f"{name}/{i}", name, text, 1.0) for i, text in enumerate(texts) for name in names]
    wanted.append(("half", "middle", texts[0], 0.5))
    seen = watch_logits(engine)
    requests = [greedy_request(rid, name, text, 6, lora_scale=scale) for rid, name, text, scale in wanted]
    warm(engine, ["low", "middle", "dense"])
    both = [ask(engine, requests[:10]), ask(engine, requests[:9:-1])]
    for rid, name, text, scale in wanted:
        ids, logits = oracle.generate(name, text, 6, scale=scale)
        assert next(asked.ids[rid] for asked in both if rid in asked.ids) == ids
        assert (torch.stack([seen[rid, i] for i in range(6)]) - logits).abs().max() <= MAX_DIFFERENCE
    assert max(asked.most_adapters_in_a_step for asked in both) >= 3
    assert engine.adapters.num_loads >= len(oracle.names), "some left the pool and came again"


@pytest.mark.parametrize("name", ["experts", "experts, down alone", "experts, transposed"])
def test_the_worker_packs_no_rows_of_experts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They arrive packed from the loader: packing in the worker's Python would delay its steps."""
    make_adapter(KINDS[name], tmp_path)
    monkeypatch.setattr(Packer, "pack", lambda *_: pytest.fail("the worker packs an adapter"))
    assert measure(KINDS[name], tmp_path).difference <= MAX_DIFFERENCE


def test_rows_without_room_are_refused_by_name(oracle: Oracle) -> None:
    engine = oracle.engine(adapter_extra_bytes=page_budget(oracle, 1))
    error = refusal(engine, greedy_request("a", "high", prompts(1, 199, (9,))[0], 3))
    assert error.status == 422
    assert "bytes of the adapter pool" in error.message


def test_slots_of_adapters_without_rows_are_no_experts(oracle: Oracle) -> None:
    """A slot that had rows for experts is reused by an adapter without any, whose tokens must not get them."""
    engine = oracle.engine()
    prompt = prompts(1, 199, (9,))[0]
    assert ask(engine, [greedy_request("a", "high", prompt, 3)]).ids["a"] == oracle.greedy("high", prompt, 3)
    context, slot = engine.model.context, engine.adapters.pool.residents["high"].slot
    assert context.expert_slots[slot]
    assert engine.adapters.drop("high") is not None
    assert ask(engine, [greedy_request("b", "dense", prompt, 3)]).ids["b"] == oracle.greedy("dense", prompt, 3)
    assert engine.adapters.pool.residents["dense"].slot == slot
    assert not context.expert_slots.any()


class NoWaits(TorchDispatchMode):
    """Fails at an operator that waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in WAITS, func
        return func(*args, **(kwargs or {}))


def test_no_layer_of_experts_waits_for_the_device(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the device knows to which experts rows are routed."""
    forward, ran = GroupedExperts.forward, list[bool]()

    def watched(self: GroupedExperts, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(kwargs["batch"] is not None)
        with NoWaits():
            return forward(self, *args, **kwargs)

    engine = oracle.engine()
    monkeypatch.setattr(GroupedExperts, "forward", watched)
    ask(engine, [greedy_request("a", "high", prompts(1, 199, (9,))[0], 3)])
    assert sum(ran) >= 3


def test_steps_with_rows_of_experts_are_not_replayed(oracle: Oracle) -> None:
    """A recorded step does not know which adapters have such rows."""
    engine, recorder = oracle.engine(kernels="reference", max_num_seqs=4), Rerun()
    engine.runner.record(recorder, 4, engine.config.max_model_len)
    warm(engine, oracle.names)
    prompt = prompts(1, 199, (9,))[0]
    for name, replays in (("high", False), ("dense", True), ("", True)):
        recorder.num_replays = [0] * len(recorder.num_replays)
        assert ask(engine, [greedy_request("a", name, prompt, 5)]).ids["a"] == oracle.greedy(name, prompt, 5)
        assert (sum(recorder.num_replays) > 0) == replays


MANY = {"num_experts": 16, "num_local_experts": 16}


@pytest.mark.parametrize("base", [MIXTRAL, GPT_OSS], ids=str)
def test_rows_of_experts_that_nobody_goes_to_are_not_read(
    base: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind((base[0], base[1] | MANY), EXPERT_PARAMETERS)
    make_adapter(kind, tmp_path)
    engine = make_engine(kind.base, {"tuned": tmp_path}, prefix_cache=False)
    prompt = asked_prompts(kind)[0]
    hit = {name: torch.zeros(16, dtype=torch.bool) for name in engine.model.adaptable.experts}
    assert hit
    names, forward = {id(one): name for name, one in engine.model.adaptable.experts.items()}, GroupedExperts.forward

    def watched(self: GroupedExperts, hidden: Tensor, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hit[names[id(self)]][ids.unique()] = True
        return forward(self, hidden, ids, *args, **kwargs)

    monkeypatch.setattr(GroupedExperts, "forward", watched)
    first = ask(engine, [greedy_request("first", "tuned", prompt, 2)]).ids["first"]
    assert engine.adapters.extras.get("tuned", Extras()).parameters == {}
    slot = engine.adapters.pool.residents["tuned"].slot
    for name, module in engine.model.adaptable.experts.items():
        assert not hit[name].all(), "or nothing would be shown"
        for site in module.sites:
            assert site.pages is not None
            assert site.first_pages is not None
            rows = site.pages.site.a_rows.view(-1, 16, 16, site.shape.in_features)
            rows[int(site.first_pages[slot]), ~hit[name]] = torch.nan
    assert ask(engine, [greedy_request("again", "tuned", prompt, 2)]).ids["again"] == first


class Doubled(nn.Module):
    """Has the attributes of an expert module but computes something else."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return gate * up

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return 2 * hidden


def test_what_only_looks_like_experts_has_no_rows() -> None:
    modules = {"layers.0.experts": AdaptableModule("layers.0.experts", Doubled(), TokenLayout((0, 0, 0), (0,), 2))}
    assert find_grouped_experts(modules, None) == {}
