"""Drafts by an EAGLE-3 head follow its published definition and change no output, however wrong they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import test_grammars
from oracle.adapters.peft_kinds import make_base, read_files
from oracle.eagle_definition import EPS, HEADS, TAPS, WIDTH, Tensors, by_definition
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, packed_engine, prompts, random_llama, warm
from oracle.test_draft_failures import ByShares
from oracle.test_draft_model import NUM_TOKENS, SPECULATING, Always, compare_drawn, watch_drafts
from oracle.test_grammars import TOKENIZER
from oracle.tiny_models import tiny_model
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.build import load_engine
from gpu_worker.drafting.draft_head import DraftHead
from gpu_worker.drafting.load import LoadedHead, load_draft_model
from gpu_worker.drafting.payoff import Acceptance, Payoff
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

LAYERS, INNER = 8, 96
DRAFTED = 150  # size of the head's vocabulary
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "vocab_size": TINY_VOCAB,
    "draft_vocab_size": DRAFTED,
    "tie_word_embeddings": False,
}

FEW: dict[str, Any] = {"kv_cache_bytes": 9 * LAYERS * 4096 * 8 // 7, "max_model_len": 128, "max_num_seqs": 3}
"""Space for nine blocks of the base and three of the head."""


def deep_llama(vocab_size: int = TINY_VOCAB) -> PreTrainedModel:
    """Return a random Llama whose next token depends more on the last token than on those before."""
    model = random_llama(
        std=0.2,
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 0.015
    return model


@pytest.fixture(scope="module")
def deep() -> Oracle:
    return Oracle(deep_llama(), {"x1": Lora(4), "x2": Lora(1), "x3": Lora(8, ("q_proj", "o_proj"))}, scale=0.1)


def random_tensors(vocab_size: int = TINY_VOCAB, drafted: int = DRAFTED) -> Tensors:
    """Return a head's tensors by their published names. It knows some of the base's tokens, in shuffled order."""
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    ids = torch.randperm(vocab_size, generator=generator)[:drafted].sort().values
    shapes = {"q": (WIDTH, 2 * WIDTH), "k": (WIDTH, 2 * WIDTH), "v": (WIDTH, 2 * WIDTH), "o": (WIDTH, WIDTH)}
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    return {
        "fc.weight": numbers(WIDTH, 3 * WIDTH),
        **{f"midlayer.self_attn.{name}_proj.weight": numbers(*shape) for name, shape in shapes.items()},
        "midlayer.mlp.gate_proj.weight": numbers(INNER, WIDTH),
        "midlayer.mlp.up_proj.weight": numbers(INNER, WIDTH),
        "midlayer.mlp.down_proj.weight": numbers(WIDTH, INNER),
        "lm_head.weight": 3 * numbers(drafted, WIDTH),
        **{f"{name}.weight": 1 + 0.2 * torch.randn(WIDTH, generator=generator) for name in norms},
        "d2t": ids - torch.arange(drafted),
        "t2d": torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, value=True),
    }


def good_tensors(base: PreTrainedModel) -> Tensors:
    """Return a head that predicts what the base predicts from its last token alone, so that it is often right.

    Its attention sees only earlier copies of the last token, and passes their embedding on.
    """
    made = random_tensors(base.config.vocab_size, base.config.vocab_size)
    same, none = torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)
    made |= {f"midlayer.self_attn.{name}_proj.weight": torch.cat((9 * same, none), 1) for name in "qk"}
    made["midlayer.self_attn.v_proj.weight"] = torch.cat((same, none), 1)
    made["midlayer.self_attn.o_proj.weight"] = 100 * same
    made["midlayer.input_layernorm.weight"] = torch.ones(WIDTH)
    decoder: Any = base.get_decoder()
    head: Any = base.get_output_embeddings()
    made |= {"norm.weight": decoder.norm.weight.data.clone(), "lm_head.weight": head.weight.data.clone()}
    return made


def saved(folder: Path, tensors: Tensors, **config: Any) -> str:
    """Save a head to a folder; return its path."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def engine_of(
    oracle: Oracle,
    head: str,
    tokenizer: str | None = None,
    num_read: int = 1 << 20,
    payoff: Payoff | None = None,
    **settings: Any,
) -> Engine:
    """Return an engine on a copy of the base, with a head that drafts whenever possible."""
    model = prepare_model(copy.deepcopy(oracle.untouched), frozenset(), None)
    loaded = load_draft_model(head, tokenizer, model, None)
    assert isinstance(loaded, LoadedHead)
    values = {"model": "oracle", "adapter_pool_bytes": 64 << 20, "kv_cache_bytes": 64 << 20} | SPECULATING | settings
    draft = LoadedHead(loaded.head, payoff or Always(num_read))
    return packed_engine(model, Settings(**values), oracle.fetch, tokenizer, draft)


def head_of(engine: Engine) -> DraftHead:
    source = engine.batcher.draft_model
    assert isinstance(source, DraftHead)
    return source


def watch_logits(engine: Engine) -> list[Tensor]:
    """Return a list to which each pass of the engine's head appends its logits."""
    head, found = head_of(engine).head, list[Tensor]()
    forward = head.forward

    def spy(input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        found.append(forward(input_ids, position_ids, logit_rows))
        return found[-1]

    head.forward = spy
    return found


@pytest.mark.parametrize(
    ("num_read", "settings"),
    [(1 << 20, {}), (12, {"max_step_tokens": 12})],
    ids=["at-once", "in-chunks"],
)
def test_drafts_are_those_of_the_published_definition(
    deep: Oracle, tmp_path: Path, num_read: int, settings: dict[str, Any]
) -> None:
    """After right and wrong drafts, beside others, and from the hidden states of each adapter."""
    for made in (random_tensors(), good_tensors(deep.untouched)):
        engine = engine_of(
            deep, saved(tmp_path, made, draft_vocab_size=len(made["d2t"])), num_read=num_read, **settings
        )
        warm(engine, deep.names)
        found, texts = watch_drafts(engine), prompts(3, TINY_VOCAB, (3, 24, 45))
        names = ("", "x1", "x2")
        asked = ask(engine, [greedy_request(str(i), names[i], text, 24) for i, text in enumerate(texts)])
        starts = {text.tobytes(): names[i] for i, text in enumerate(texts)}
        for i, text in enumerate(texts):
            assert asked.ids[str(i)] == deep.greedy(names[i], text, 24)
        assert len(found) > 6
        for text, draft in found:
            name = next(own for start, own in starts.items() if text.tobytes().startswith(start))
            assert draft == by_definition(made, deep, name, text, len(draft))[0]
        assert len({draft[0] for _, draft in found}) > 4


def test_logits_are_those_of_the_published_definition(deep: Oracle, tmp_path: Path) -> None:
    made = random_tensors()
    engine = engine_of(deep, saved(tmp_path, made))
    warm(engine, deep.names)
    passes, found, [text] = watch_logits(engine), watch_drafts(engine), prompts(1, TINY_VOCAB, (24,))
    ask(engine, [greedy_request("r", "x1", text, 20)])
    assert len(passes) == sum(len(draft) for _, draft in found) > 8
    logits = iter(passes)
    for text, draft in found:
        for wanted in by_definition(made, deep, "x1", text, len(draft))[1]:
            assert torch.allclose(next(logits)[0], wanted, atol=1e-4)


def test_a_base_with_experts_has_drafts(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": LAYERS, "num_local_experts": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    oracle, made = Oracle(make_base(("mixtral", fields)), {}, scale=0.1), random_tensors()
    engine = engine_of(oracle, saved(tmp_path, made))
    found, [text] = watch_drafts(engine), prompts(1, TINY_VOCAB, (24,))
    assert ask(engine, [greedy_request("r", "", text, 30)]).ids["r"] == oracle.greedy("", text, 30)
    assert len(found) > 2
    assert all(draft == by_definition(made, oracle, "", longer, len(draft))[0] for longer, draft in found)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 12}, FEW], ids=["plain", "chunked", "preempted"])
def test_greedy_answers_are_pefts(deep: Oracle, tmp_path: Path, settings: dict[str, Any]) -> None:
    texts, num = prompts(5, TINY_VOCAB, (3, 8, 17, 24, 31)), 8
    names = [deep.names[i % 4] for i in range(num)]
    engine = engine_of(deep, saved(tmp_path, good_tensors(deep.untouched), draft_vocab_size=TINY_VOCAB), **settings)
    warm(engine, deep.names)
    asked = ask(engine, [greedy_request(str(i), names[i], texts[i % 5], NUM_TOKENS) for i in range(num)])
    for i in range(num):
        assert asked.ids[str(i)] == deep.greedy(names[i], texts[i % 5], NUM_TOKENS), names[i]
    counters = engine.counters
    assert 0 < counters.num_model_accepted_tokens < counters.num_model_drafted_tokens
    assert counters.num_output_tokens == NUM_TOKENS * num
    assert (counters.num_preemptions > 0) == (settings is FEW)
    source = head_of(engine)
    assert source.blocks.num_free == source.blocks.num_blocks
    assert not source._readings


def test_a_head_of_random_weights_is_wrong_and_costs_no_answer(deep: Oracle, tmp_path: Path) -> None:
    engine = engine_of(deep, saved(tmp_path, random_tensors()))
    warm(engine, deep.names)
    texts = prompts(3, TINY_VOCAB, (3, 24, 45))
    names = ("", "x1", "x3")
    asked = ask(engine, [greedy_request(str(i), names[i], text, 30) for i, text in enumerate(texts)])
    for i, text in enumerate(texts):
        assert asked.ids[str(i)] == deep.greedy(names[i], text, 30)
    counters = engine.counters
    assert counters.num_model_drafted_tokens > 100
    assert counters.num_model_accepted_tokens < counters.num_model_drafted_tokens / 10


def test_drawn_penalised_and_stopped_answers_are_those_without_drafts(deep: Oracle, tmp_path: Path) -> None:
    head = saved(tmp_path, good_tensors(deep.untouched), draft_vocab_size=TINY_VOCAB)
    compare_drawn(deep, deep.engine(), engine_of(deep, head))


def test_outputs_with_a_grammar_are_those_without_drafts(tmp_path: Path) -> None:
    oracle = Oracle(deep_llama(test_grammars.VOCAB), {"x1": Lora(4)}, scale=0.1)
    sizes = {"draft_vocab_size": test_grammars.VOCAB, "vocab_size": test_grammars.VOCAB}
    engine = engine_of(oracle, saved(tmp_path, good_tensors(oracle.untouched), **sizes), TOKENIZER.to_str())
    plain = oracle.engine(TOKENIZER)
    requests = [
        replace(
            greedy_request(f"{name}/{i}", name, text, NUM_TOKENS),
            grammar=test_grammars.grammar(lark_grammar="start: /[^e]{1,200}/"),
        )
        for name in oracle.names
        for i, text in enumerate(prompts(2, test_grammars.VOCAB))
    ]
    for one in (plain, engine):
        warm(one, oracle.names)
    wanted, asked = ask(plain, requests), ask(engine, requests)
    assert asked.ids == wanted.ids
    free = ask(plain, [replace(request, rid=f"free {request.rid}", grammar="") for request in requests]).ids
    assert [free[f"free {request.rid}"] for request in requests] != [asked.ids[request.rid] for request in requests]
    counters = engine.counters
    assert 0 < counters.num_model_accepted_tokens < counters.num_model_drafted_tokens


def test_behind_a_cached_prefix_it_reads_what_is_computed(deep: Oracle, tmp_path: Path) -> None:
    made = good_tensors(deep.untouched)
    engine = engine_of(deep, saved(tmp_path, made, draft_vocab_size=TINY_VOCAB))
    [text] = prompts(1, TINY_VOCAB, (45,))
    first = ask(engine, [greedy_request("one", "", text, 30)]).ids["one"]
    cached = engine.counters.num_cached_tokens
    found = watch_drafts(engine)
    assert ask(engine, [greedy_request("two", "", text, 30)]).ids["two"] == first == deep.greedy("", text, 30)
    start = engine.counters.num_cached_tokens - cached
    assert start == 32
    assert found
    for longer, draft in found:
        assert draft == by_definition(made, deep, "", longer, len(draft), start)[0]


def test_beside_many_others_nothing_is_kept(deep: Oracle, tmp_path: Path) -> None:
    engine = engine_of(
        deep, saved(tmp_path, good_tensors(deep.untouched), draft_vocab_size=TINY_VOCAB), max_num_seqs=16
    )
    source, texts = head_of(engine), prompts(5, TINY_VOCAB)
    for i in range(12):
        engine.add(greedy_request(str(i), "", texts[i % 5], 24 if i < 9 else 60))
    num_steps = 0
    while engine.counters.num_output_tokens < 9 * 20:
        engine.step()
        num_steps += 1
        assert source.blocks.num_free == source.blocks.num_blocks
    assert not engine.counters.num_model_drafted_tokens
    asked = ask(engine, [])
    assert engine.counters.num_model_accepted_tokens > 0, "with three left, it reads what comes from then on"
    assert {end.error for end in asked.finish.values()} == {None}


class AlwaysRight(Acceptance):
    """The share of right draft tokens of texts that this test does not run."""

    def learn(self, num_drafted: int, num_right: int) -> None:
        """Keep the share."""


@pytest.mark.parametrize("others", [Acceptance(), AlwaysRight(1.0)], ids=["alone", "others are right"])
def test_where_drafts_would_not_pay_no_hidden_states_are_gathered(
    others: Acceptance, deep: Oracle, tmp_path: Path
) -> None:
    engine = engine_of(deep, saved(tmp_path, random_tensors()), payoff=ByShares())
    head_of(engine)._typical = others
    head, [text], num = head_of(engine).head, prompts(1, TINY_VOCAB, (24,)), 0
    project = head.project

    def spy(states: list[Tensor]) -> Tensor:
        nonlocal num
        num += 1
        return project(states)

    head.project = spy
    assert ask(engine, [greedy_request("r", "", text, 60)]).ids["r"] == deep.greedy("", text, 60)
    assert engine.counters.num_model_drafted_tokens > 0
    assert 0 < num < 30


@pytest.mark.parametrize("part", ["put", "forward", "project"])
def test_a_head_that_fails_costs_no_answer(deep: Oracle, tmp_path: Path, part: str) -> None:
    engine = engine_of(deep, saved(tmp_path, good_tensors(deep.untouched), draft_vocab_size=TINY_VOCAB))
    source, texts, num = head_of(engine), prompts(3, TINY_VOCAB), 0

    def fail(*_: Any) -> Any:
        nonlocal num
        num += 1
        raise RuntimeError("bug")

    setattr(source.head, part, fail)
    asked = ask(engine, [greedy_request(str(i), "", text, 30) for i, text in enumerate(texts)])
    for i, text in enumerate(texts):
        assert asked.ids[str(i)] == deep.greedy("", text, 30)
    assert num == 1
    assert source.blocks.num_free == source.blocks.num_blocks


def test_virtual_tokens_stop_no_drafts(tmp_path: Path) -> None:
    """The head skips an adapter's virtual tokens: they have hidden states, but no embedding of the base."""
    oracle = Oracle(deep_llama(), {}, scale=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)  # behind some random prompts the head is never right
        tuned = get_peft_model(deep_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    tuned.save_pretrained(str(tmp_path / "soft"))
    oracle._files["soft"] = read_files(tmp_path / "soft")
    head = saved(tmp_path / "head", good_tensors(oracle.untouched), draft_vocab_size=TINY_VOCAB)
    engine, plain = engine_of(oracle, head, max_step_tokens=16), oracle.engine()
    requests = [greedy_request(str(i), "soft", text, 30) for i, text in enumerate(prompts(3, TINY_VOCAB))]
    for one in (plain, engine):
        warm(one, ["soft"])
    assert ask(engine, requests).ids == ask(plain, requests).ids
    assert not head_of(engine)._num_idle, "no pass has failed"
    assert engine.counters.num_model_accepted_tokens > 0


def test_a_text_longer_than_all_blocks_is_read_from_behind(deep: Oracle, tmp_path: Path) -> None:
    head = saved(tmp_path, good_tensors(deep.untouched), draft_vocab_size=TINY_VOCAB)
    engine = engine_of(deep, head, **FEW, max_step_tokens=32)
    source = head_of(engine)
    assert source.blocks.num_blocks == 3
    [text] = prompts(1, TINY_VOCAB, (90,))
    asked = ask(engine, [greedy_request("r", "", text, 30)])
    assert asked.ids["r"] == deep.greedy("", text, 30)
    assert engine.counters.num_model_accepted_tokens > 0
    assert source.blocks.num_free == 3


# ---------------------------------------------------------------- start


def test_settings_load_it_within_its_share_of_the_cache(
    deep: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    deep.untouched.save_pretrained(tmp_path / "base")
    head = saved(tmp_path / "head", good_tensors(deep.untouched), draft_vocab_size=TINY_VOCAB)
    settings = Settings(
        model=str(tmp_path / "base"),
        draft_model=head,
        dtype="float32",
        device="cpu",
        kv_cache_bytes=1 << 20,
        adapter_pool_bytes=1 << 20,
        threads=1,
    )
    thread, served = load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
    engine = thread.engine
    assert isinstance(engine, Engine)
    assert served.draft_model == "head"
    source = head_of(engine)
    num_bytes = source.blocks.num_blocks * source.head.block_bytes
    assert 0 < num_bytes <= settings.kv_cache_bytes // 8
    assert engine.config.kv_bytes + num_bytes <= settings.kv_cache_bytes
    [text] = prompts(1, TINY_VOCAB, (24,))
    assert ask(engine, [greedy_request("r", "", text, 30)]).ids["r"] == deep.greedy("", text, 30)
    thread.engine.close()


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda made: {name: tensor for name, tensor in made.items() if name not in names}


def but(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda made: made | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "config", "wanted"),
    [
        (without("fc.weight", "norm.weight"), {}, "its weights lack fc.weight, norm.weight"),
        (without("d2t"), {}, "its weights lack d2t"),
        (but(medusa__weight=torch.ones(2)), {}, "its weights have medusa.weight, which no head has that is served"),
        (but(fc__weight=torch.ones(WIDTH, 3 * 48)), {}, r"fc.weight has the shape \[64, 144\], with .* \[64, 192\]"),
        (but(d2t=torch.full((DRAFTED,), 99)), {}, "d2t names tokens outside the base's 0 … 198"),
        (but(d2t=torch.zeros(DRAFTED, dtype=torch.int64)), {}, "d2t and t2d name different tokens"),
        (None, {"vocab_size": 320}, "for a vocabulary of 320 tokens, the base has 199"),
        (None, {"num_hidden_layers": 2}, "num_hidden_layers is 2 in its config; served is 1"),
        (None, {"hidden_act": "gelu"}, "hidden_act is gelu in its config; served is silu"),
        (None, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of the type dynamic; served are default"),
        (None, {"norm_before_residual": True}, "norm_before_residual is True in its config; served is False"),
        (None, {"eagle_config": {"use_aux_hidden_state": False}}, "the base's last hidden states alone"),
        (None, {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, r"layers \[1, 2, 3\] .* those before 2, 4, 5"),
        (None, {"architectures": ["LlamaForCausalLMEagle"]}, "it is a head of the kind LlamaForCausalLMEagle"),
        (None, {"architectures": ["MedusaModel"]}, "it is a head of the kind MedusaModel"),
        (None, {"eagle_config": "x"}, "it cannot be read: 'str' object has no attribute 'get'"),
        (None, {"eagle_aux_hidden_state_layer_ids": 3}, "it cannot be read: 'int' object is not iterable"),
        (None, {"num_attention_heads": 0}, "is not a valid llama config: .*modulo by zero"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    deep: Oracle, tmp_path: Path, change: Callable[[Tensors], Tensors] | None, config: dict[str, Any], wanted: str
) -> None:
    made = random_tensors()
    head = saved(tmp_path, made if change is None else change(made), **config)
    base = prepare_model(copy.deepcopy(deep.untouched), frozenset(), None)
    with pytest.raises(BadRequest, match=f"draft_model is {head}: .*{wanted}"):
        load_draft_model(head, None, base, None)


def test_an_index_that_is_none_is_refused(deep: Oracle, tmp_path: Path) -> None:
    head = saved(tmp_path, random_tensors())
    base = prepare_model(copy.deepcopy(deep.untouched), frozenset(), None)
    for index in ("[]", '{"weight_map": [1]}', '{"weight_map": {"fc.weight": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(BadRequest, match=f"draft_model is {head}: "):
            load_draft_model(head, None, base, None)


def test_a_bases_own_heads_are_refused_by_name(deep: Oracle, tmp_path: Path) -> None:
    deep.untouched.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, wanted in (
        ("mtp.fc.weight", "the base's own head is of the type llama; served are qwen3_5_text"),
        (
            "model.layers.8.eh_proj.weight",
            r"own head for further tokens \(model.layers.8.eh_proj.weight\) is not served",
        ),
    ):
        save_file(tensors | {name: torch.ones(2)}, file, {"format": "pt"})
        base = prepare_model(type(deep.untouched).from_pretrained(tmp_path), frozenset(), None)
        with pytest.raises(BadRequest, match=wanted):
            load_draft_model(str(tmp_path), None, base, None, tmp_path)


def test_layers_are_named_by_inputs_or_outputs(deep: Oracle, tmp_path: Path) -> None:
    base = prepare_model(copy.deepcopy(deep.untouched), frozenset(), None)
    for named in (
        {"eagle_aux_hidden_state_layer_ids": [*TAPS]},
        {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in TAPS]}},
    ):
        assert load_draft_model(saved(tmp_path, random_tensors(), **named), None, base, None)


def test_bases_whose_layers_cannot_be_read_are_refused(tiny: Oracle, tmp_path: Path) -> None:
    head = saved(tmp_path, random_tensors())
    small = prepare_model(copy.deepcopy(tiny.untouched), frozenset(), None)
    with pytest.raises(BadRequest, match="which reads three layers of 7; the base has 2"):
        load_draft_model(head, None, small, None)
    other = prepare_model(tiny_model("gemma2"), frozenset(), None)
    with pytest.raises(BadRequest, match="those of gemma2 are not"):
        load_draft_model(head, None, other, None)
