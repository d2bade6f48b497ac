"""Layers in one native call give the same bits as one by one; layers for which that does not hold stay separate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from helpers.fixed_sums import fixed_sums
from oracle.adapters.kind_cases import CASES, FORMS
from oracle.adapters.peft_kinds import LLAMA, MAX_DIFFERENCE, Kind, engine_logits, make_adapter, make_engine
from oracle.peft_oracle import ATTENTION, MLP, TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, warm, watch
from oracle.tiny_models import tiny_model
from torch import Tensor, nn

from gpu_worker.engine.engine import Engine
from gpu_worker.layers.blocks import FEWEST_ANGLES, Angles, LayerStack, PlainDecoder, PreNormLayer
from gpu_worker.layers.stack_changes import MAX_SCALED, StackChanges
from lora_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no native kernels: layers run one by one")

STACKED = {
    "llama": ("q_proj", "down_proj"),
    "mistral": ("k_proj", "up_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("o_proj", "gate_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "qwen3_5_text": ("in_proj_qkv", "up_proj"),
}
"""Types that consist of such layers, and names that an adapter may target in them."""


def stacks(engine: Engine) -> list[LayerStack]:
    forwards = [getattr(module, "forward", None) for module in engine.model.module.modules()]
    return [owner for forward in forwards if type(owner := getattr(forward, "__self__", None)) is LayerStack]


def plain_decoders(engine: Engine) -> list[PlainDecoder]:
    forwards = [getattr(module, "forward", None) for module in engine.model.module.modules()]
    return [owner for forward in forwards if type(owner := getattr(forward, "__self__", None)) is PlainDecoder]


def logits_of(engine: Engine, names: list[str], lengths: Sequence[int] = (5, 33, 20)) -> list[Tensor]:
    """Return the logits of every step of a mixed batch with chunked prefill."""
    seen: list[Tensor] = []
    watch(engine, lambda _, logits: seen.append(logits.clone()))
    warm(engine, names)
    asked_prompts = prompts(3, TINY_VOCAB, lengths)
    ask(engine, [greedy_request(f"{n}/{i}", n, p, 6) for i, p in enumerate(asked_prompts) for n in names])
    return seen


@pytest.mark.parametrize("dtype", examples.some([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
@pytest.mark.parametrize("model_type", STACKED)
def test_a_stack_computes_what_its_layers_compute(model_type: str, dtype: torch.dtype) -> None:
    targets = STACKED[model_type]
    base = tiny_model(model_type)
    nn.Module.to(base, dtype)  # `PreTrainedModel.to` has no types
    oracle = Oracle(base, {"one": Lora(5, targets), "two": Lora(17, (targets[0], "lm_head"))}, scale=0.4)
    stacked, apart = (oracle.engine(max_step_tokens=16, max_num_seqs=12) for _ in range(2))
    (stack,) = stacks(stacked)
    assert len(stack.layers) == base.config.num_hidden_layers
    for layer in stacks(apart):
        layer._stack = None  # built by the engine's check; without it layers run separately
    # After the last attention a stack computes fewer rows, and a row's bits may depend on the others unless sums are
    # fixed. With plain weights it computes all rows; with fixed sums plain weights have no stack.
    with fixed_sums() if dtype == torch.bfloat16 else nullcontext():
        got, expected = logits_of(stacked, ["", "one", "two"]), logits_of(apart, ["", "one", "two"])
    assert type(stack._stack) is cpu.NativeDecoderStack
    assert all(layer._stack is None for layer in stacks(apart)), "or this compares stacks"
    assert len(got) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "case",
    examples.some(
        product([(0, "auto"), (0, "int8"), (-1, "auto"), (1, "int8")], [False, True]),
        ((0, "auto"), False), ((0, "int8"), True), ((-1, "auto"), True),
    ),
    ids=str,
)  # fmt: skip
def test_products_that_add_many_adapters_do_so_bit_by_bit(case: tuple[tuple[int, str], bool]) -> None:
    (place, lora_dtype), are_fixed = case
    best, isas = cpu.isa(), cpu.isas()
    cpu.set_isa(isas[min(place, len(isas) - 1)])
    base = tiny_model("llama")
    nn.Module.to(base, torch.bfloat16)
    targets = (("q_proj", "down_proj"), (*ATTENTION, *MLP), ("v_proj", "up_proj", "lm_head"))
    ranks = (1, 5, 8, 16, 17, 33, 8, 4, 2, 3)
    oracle = Oracle(base, {f"r{i}": Lora(rank, targets[i % 3]) for i, rank in enumerate(ranks)}, scale=0.4)
    settings = {"max_step_tokens": 120, "max_num_seqs": 40, "lora_dtype": lora_dtype}
    try:
        stacked, apart = (oracle.engine(**settings) for _ in range(2))
        (stack,) = stacks(stacked)
        for layer in stacks(apart):
            layer._stack = None
        with fixed_sums() if are_fixed else nullcontext():
            got, expected = (logits_of(engine, oracle.names, (2, 3, 4)) for engine in (stacked, apart))
    finally:
        cpu.set_isa(best)
    assert type(stack._stack) is cpu.NativeDecoderStack
    # All prompts are one step. After its last attention a stack computes fewer rows, and a row's bits depend on the
    # others unless sums are fixed. Rows with equal first tokens are compared from there on.
    prompts_step, *decodes = zip(got[-6:], expected[-6:], strict=True)
    same = torch.eq(*(one.argmax(-1) for one in prompts_step))
    assert len(same) == 3 * len(oracle.names)
    assert same.sum() > 0.8 * len(same)
    assert all(torch.equal(one[same], other[same]) for one, other in decodes)


WITH_EXPERTS = {"mixtral": ATTENTION, "qwen3_moe": ATTENTION}


@pytest.mark.parametrize("model_type", [*STACKED, *WITH_EXPERTS])
def test_a_plain_decoder_computes_what_the_model_does(model_type: str) -> None:
    targets = {**STACKED, **WITH_EXPERTS}[model_type]
    oracle = Oracle(tiny_model(model_type), {"one": Lora(5, (*targets, "embed_tokens"))}, scale=0.4)
    plain, whole = (oracle.engine(max_step_tokens=16, max_num_seqs=12) for _ in range(2))
    (decoder,), (other,) = plain_decoders(plain), plain_decoders(whole)
    calls: list[str] = []

    def watched(name: str, forward: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(name), forward(*args, **kwargs))[1]

    decoder._forward = watched("plain", decoder._forward)
    assert plain.model.plain is not None, "and no step goes through the model's own forward"
    whole.model.plain = None
    for module in whole.model.module.modules():
        if getattr(getattr(module, "forward", None), "__self__", None) is other:
            module.forward = watched("whole", other._forward)
    got, expected = logits_of(plain, ["", "one"]), logits_of(whole, ["", "one"])
    assert set(calls) == {"whole"}, "the plain decoder computes every step, and the other none"
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


ONE_CALL: dict[str, Kind] = {
    **{name: CASES[name] for name in ("ia3", "road", "oft", "boft")},
    "dora": Kind(LLAMA, {"use_dora": True}),
    "lora_bias": Kind(LLAMA, {"lora_bias": True}),
    "beft": FORMS["beft without biases"],
    "a head": Kind(LLAMA, {"target_modules": ["lm_head", "q_proj"], "use_dora": True}),
}
"""Kinds that the one native call computes entirely."""


def test_what_adapters_multiply_and_add_is_made_in_the_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the results of separate layers; a step with an adapter that it cannot compute is not one call."""
    others = {"shira": CASES["shira"], "ln_tuning": CASES["ln_tuning"]}
    for name, kind in (ONE_CALL | others).items():
        make_adapter(kind, tmp_path / name)
    engine = make_engine(LLAMA, {name: tmp_path / name for name in ONE_CALL | others}, max_num_seqs=32)
    warm(engine, ONE_CALL | others)
    apart: list[PreNormLayer] = []
    run = PreNormLayer.run

    def watched(layer: PreNormLayer, *args: Tensor) -> None:
        apart.append(layer)
        run(layer, *args)

    monkeypatch.setattr(PreNormLayer, "run", watched)
    asked = prompts(2, TINY_VOCAB, (20, 33))

    def logits(turn: str) -> dict[str, tuple[list[int], Tensor]]:
        requests = [greedy_request(f"{n}/{i}", n, p, 5, salt=turn) for n in ONE_CALL for i, p in enumerate(asked)]
        scaled = greedy_request("dora/scaled", "dora", asked[0], 5, lora_scale=0.5, salt=turn)
        return engine_logits(engine, [*requests, scaled, greedy_request("base", "", asked[0], 5, salt=turn)])

    got = logits("one call")
    assert not apart
    for name in others:
        ask(engine, [greedy_request(name, name, asked[0], 2), greedy_request(f"{name} too", "ia3", asked[0], 2)])
        assert apart, name
        apart.clear()
    scales = [0.1 * (i + 1) for i in range(MAX_SCALED + 1)]
    many = [greedy_request(f"at {scale}", "dora", asked[0], 2, lora_scale=scale) for scale in scales]
    ask(engine, many[1:])
    assert not apart
    ask(engine, [replace(request, salt="again") for request in many])
    assert apart, "factors of too many scales are not there at once"
    apart.clear()
    monkeypatch.setattr(StackChanges, "rows", lambda *_, **__: None)
    expected = logits("apart")
    assert apart
    for rid, (ids, own) in expected.items():
        assert got[rid][0] == ids, rid
        assert (got[rid][1] - own).abs().max() <= MAX_DIFFERENCE, rid
    assert len({tuple(ids) for ids, _ in got.values()}) > len(ONE_CALL)


def test_layers_with_rotary_embeddings_of_their_own_stay_apart() -> None:
    """The native call passes the first layer's input angles to every layer."""
    model = tiny_model("llama")
    for i, layer in enumerate(model.get_submodule("model.layers").children()):
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: (args, turned(kwargs, i)), with_kwargs=True)
    oracle = Oracle(model, {"one": Lora(5, ("q_proj",))}, scale=0.4)
    assert stacks(oracle.engine()) == []


def turned(kwargs: dict[str, Any], layer: int) -> dict[str, Any]:
    cos, sin = kwargs["position_embeddings"]
    return kwargs | {"position_embeddings": (cos * (1 + 1e-3 * layer), sin)}


def test_a_batch_without_adapters_needs_no_table() -> None:
    oracle = Oracle(tiny_model("llama"), {"one": Lora(5, STACKED["llama"])}, scale=0.4)
    prompt = np.arange(1, 20, dtype=np.int32)
    asked = ask(oracle.engine(), [greedy_request("base", "", prompt, 8)])
    assert asked.ids["base"] == oracle.greedy("", prompt, 8) != oracle.greedy("one", prompt, 8)


def test_angles_are_those_that_the_model_computes() -> None:
    base = tiny_model("llama", max_position_embeddings=FEWEST_ANGLES + 100)
    rotary, like = base.get_submodule("model.rotary_emb"), torch.zeros(1, dtype=torch.bfloat16)
    asked = list[int]()

    def watched(x: Tensor, position_ids: Tensor) -> Any:
        asked.append(int(position_ids.max()) + 1)
        return compute(x, position_ids)

    compute, rotary.forward = rotary.forward, watched
    angles = Angles(rotary, FEWEST_ANGLES + 100)
    for positions in ([5, 0, 4095], [4096, 7], [4195, 4194]):
        at = torch.tensor(positions)
        expected = compute(like, at[None])
        got = angles.of(at, max(positions) + 1, like)
        assert all(torch.equal(one, other[0]) for one, other in zip(got, expected, strict=True))
    assert asked == [FEWEST_ANGLES, FEWEST_ANGLES + 100], "never those of more positions than the model has"


def test_a_few_sines_wake_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model("gemma3_text")  # not a plain decoder, which looks its angles up in a table
    rotary, seen = type(base.model.rotary_emb), list[int]()
    compute = rotary.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_num_threads())
        return compute(*args, **kwargs)

    monkeypatch.setattr(rotary, "forward", watched)
    engine = Oracle(base, {"one": Lora(5, STACKED["llama"])}, scale=0.4).engine()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen.clear()
        ask(engine, [greedy_request("a", "", prompts(1, TINY_VOCAB, (5,))[0], 3)])
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
