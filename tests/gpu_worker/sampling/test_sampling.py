"""Sampling: the distributions of Hugging Face's processors, with noise that depends on (seed, position) only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gpu_worker.cuda.waits import no_waits
from gpu_worker.sampling import sampling
from gpu_worker.sampling.adjustment import MANY, Adjustment, TokenCounts
from gpu_worker.sampling.sampling import SampleRow, sample, uniforms, watermark_ids
from protocol.wire.messages import Sampling, logprob_record_bytes

NOTHING = np.zeros(0, np.int32)


def row(
    prompt: np.ndarray = NOTHING, output: np.ndarray = NOTHING, banned: tuple[int, ...] = (), **fields: Any
) -> SampleRow:
    wish = Sampling(**fields)
    adjustment = Adjustment.of(wish, prompt.astype(np.int32))
    return SampleRow(wish, output.astype(np.int32), banned, adjustment=adjustment)


def at_position(position: int, **fields: Any) -> SampleRow:
    return row(output=np.zeros(position, np.int32), **fields)


def draws(logits: torch.Tensor, num: int, **fields: Any) -> np.ndarray:
    """Return `num` tokens drawn from one row of logits, at positions 0 … num - 1."""
    rows = [at_position(position, **fields) for position in range(num)]
    return sample(logits.expand(num, -1), rows).ids


def kept_by(logits: torch.Tensor, num: int = 4000, **fields: Any) -> set[int]:
    return set(draws(logits, num, **fields).tolist())


def processed(processor: LogitsProcessor, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Return a copy of the logits as transformers processes them after these tokens."""
    scores = processor(cast(torch.LongTensor, torch.tensor([ids])), cast(torch.FloatTensor, logits.clone()))
    assert isinstance(scores, torch.Tensor)
    return scores


def test_uniforms_are_uniform_and_a_function_of_seed_and_position() -> None:
    seeds, positions = np.full(20_000, 7, np.uint64), np.arange(20_000, dtype=np.uint64)
    u = uniforms(seeds, positions)
    assert np.array_equal(u[::-1], uniforms(seeds[::-1], positions[::-1]))
    assert (u >= 0).all()
    assert (u < 1).all()
    counts, _ = np.histogram(u, bins=50, range=(0, 1))
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert chi2 < 94  # 49 degrees of freedom, p = 1e-4
    other = uniforms(seeds + np.uint64(1), positions)
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.03


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    num = 20_000
    counts = np.bincount(draws(logits, num, seed=3, temperature=0.8), minlength=5)
    expected = (logits[0] / 0.8).softmax(-1).numpy() * num
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom, p = 1e-4


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=generator)
    rng = np.random.default_rng(0)
    rows = [
        row(
            prompt=rng.integers(300, size=5), output=rng.integers(300, size=i % 7), seed=i, temperature=(i % 4) / 2,
            top_k=(0, 5)[i % 2], top_p=(1.0, 0.9)[i % 3 == 0], min_p=(0.0, 0.05)[i % 5 == 0],
            typical_p=(1.0, 0.8)[i % 6 == 0], presence_penalty=(i % 3) / 3, repetition_penalty=(1.0, 1.3)[i % 2],
        )
        for i in range(40)
    ]  # fmt: skip
    together = sample(logits, rows).ids
    alone = [sample(logits[i : i + 1], rows[i : i + 1]).ids[0] for i in range(40)]
    assert together.tolist() == alone
    order = rng.permutation(40)
    assert sample(logits[order], [rows[i] for i in order]).ids.tolist() == together[order].tolist()


def test_temperature_zero_is_greedy_inside_a_mixed_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    rows = [at_position(i, seed=i, temperature=0.0 if i % 2 else 5.0) for i in range(6)]
    assert sample(logits, rows).ids[1::2].tolist() == logits.argmax(-1)[1::2].tolist()
    assert sample(logits.bfloat16(), rows).ids[1::2].tolist() == logits.bfloat16().argmax(-1)[1::2].tolist()


@pytest.mark.parametrize(
    ("fields", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
        ({"typical_p": 0.6}, TypicalLogitsWarper(0.6)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_each_filter_keeps_what_hugging_face_keeps(fields: dict[str, Any], warper: LogitsProcessor) -> None:
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(5))
    expected = set(torch.isfinite(processed(warper, [0], logits)[0]).nonzero()[:, 0].tolist())
    assert 0 < len(expected) < 60
    assert kept_by(logits, num=4_000, seed=1, **fields) == expected


def test_top_p_sorts_a_flat_distribution_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 0.1 * torch.randn(1, 3 * sampling.TOP_P_CANDIDATES, generator=generator)
    filtered = logits.clone()
    sampling._keep_top_p_(filtered, [0.8])
    expected = processed(TopPLogitsWarper(0.8), [0], logits)
    assert torch.isfinite(filtered).sum() > sampling.TOP_P_CANDIDATES
    assert torch.equal(torch.isfinite(filtered), torch.isfinite(expected))


def test_top_p_is_the_same_to_the_bit_where_the_host_does_not_wait() -> None:
    """For flat and peaked rows, and rows whose fp32 probabilities add up to less than p."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(48, 2 * sampling.TOP_P_CANDIDATES, generator=generator) * torch.logspace(-2, 1, 48)[:, None]
    logits[::5] = (logits[::5] * 4).round() / 4  # ties
    probs = logits.softmax(-1)
    p = torch.tensor([0.05, 0.5, 0.9, 0.999, 1 - 2**-24, 1e-9]).repeat(8)
    kept = sampling._least_likely(probs, p)
    assert torch.equal(probs < kept, probs < sampling._least_likely_of_all(probs, p))
    num = (probs >= kept).sum(-1)
    assert num.min() == 1
    assert num.max() > sampling.TOP_P_CANDIDATES


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 5, 6, 100])
def test_repetition_penalty_looks_back_as_far_as_is_asked(window: int) -> None:
    """Over prompt and output. window: 0 is as far as they go."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    prompt, output = np.array([1, 2, 2], np.int32), np.array([5, 6], np.int32)
    for num in (0, 1, 2):
        seen = [1, 2, 2, 5, 6][: 3 + num][-window:]
        expected = processed(RepetitionPenaltyLogitsProcessor(1.7), seen, logits)
        adjusted = logits[0].clone()
        asked = row(prompt, output[:num], repetition_penalty=1.7, repetition_window=window)
        sampling._adjust_(adjusted, asked)
        assert torch.allclose(adjusted, expected[0])


def test_presence_and_frequency_are_over_the_output_alone() -> None:
    logits = torch.zeros(8)
    sampling._adjust_(logits, row(np.array([1, 2]), np.array([3, 3, 4]), presence_penalty=0.5, frequency_penalty=0.25))
    assert logits.tolist() == [0, 0, 0, -1.0, -0.75, 0, 0, 0]


def test_bias_and_bans_apply_to_greedy_too() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    chosen = [
        sample(logits, [wish]).ids[0]
        for wish in (
            row(temperature=0.0),
            row(temperature=0.0, banned=(0,)),
            row(temperature=0.0, logit_bias={3: 100.0}),
            row(temperature=0.0, presence_penalty=1.5, output=np.array([0])),
        )
    ]
    assert chosen == [0, 1, 3, 1]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(4))
    rows = [
        row(temperature=0.0, num_logprobs=4, logit_bias={17: 100.0}),
        row(temperature=0.0),
        row(temperature=0.3, num_logprobs=0, seed=1),
    ]
    result = sample(logits, rows)
    expected = logits.log_softmax(-1)
    assert result.logprobs[1] == b""
    assert len(result.logprobs[0]) == logprob_record_bytes(4)
    assert len(result.logprobs[2]) == logprob_record_bytes(0)
    assert result.ids[0] == 17
    assert np.frombuffer(result.logprobs[0][:4], "<f4")[0] == pytest.approx(expected[0, 17].item(), abs=1e-6)
    assert np.frombuffer(result.logprobs[2], "<f4")[0] == pytest.approx(expected[2, result.ids[2]].item(), abs=1e-6)
    top = np.frombuffer(result.logprobs[0][4:], np.dtype([("id", "<i4"), ("logprob", "<f4")]))
    values, ids = expected[0].topk(4)
    assert top["id"].tolist() == ids.tolist()
    assert np.allclose(top["logprob"], values.numpy(), atol=1e-6)


def test_logits_that_are_not_finite_spoil_their_row_only() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(4))
    logits[1, 3] = torch.nan
    result = sample(logits, [row(temperature=1.0, seed=i) for i in range(3)])
    assert result.finite == [True, False, True]
    clean = sample(logits[2:], [row(temperature=1.0, seed=2)])
    assert result.ids[2] == clean.ids[0]


def test_seeds_of_any_size_are_taken() -> None:
    logits = torch.zeros(2, 100)
    wide, same = sample(logits, [row(seed=-1), row(seed=(1 << 64) - 1)]).ids
    assert wide == same


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_choosing_never_waits_for_a_gpu() -> None:
    logits = torch.randn(7, 500, device="cuda")
    rows = [
        row(temperature=0.0), row(temperature=1.0, top_k=7), row(temperature=1.0, min_p=0.1, logit_bias={3: 2.0}),
        row(temperature=0.9, typical_p=0.5), row(output=np.arange(5), temperature=0.0, presence_penalty=1.0),
        row(temperature=1.1, top_p=0.9),
        row(prompt=np.arange(9), temperature=0.0, repetition_penalty=1.3, banned=(1, 2), num_logprobs=3),
    ]  # fmt: skip
    sampling.begin_sample(logits, rows)
    with no_waits():
        pending = sampling.begin_sample(logits, rows)
    ids = pending.result().ids
    assert ids.tolist() == sample(logits.cpu(), rows).ids.tolist()


# ---------------------------------------------------------------- where LoRAX differs

PAIR = np.dtype([("id", "<i4"), ("logprob", "<f4")])


def test_lorax_counts_the_share_of_a_token_in_all_text() -> None:
    wish = row(
        np.array([1, 1, 2]), np.array([3]), temperature=0.0, frequency_penalty=1.0, presence_penalty=0.5,
        penalties="lorax", num_logprobs=5, logprobs_of="choice",
    )  # fmt: skip
    record = np.frombuffer(sample(torch.zeros(1, 6), [wish]).logprobs[0][4:], PAIR)
    expected = torch.tensor([0, -1.0, -0.75, -0.75, 0, 0]).log_softmax(-1)
    assert record["logprob"].tolist() == pytest.approx(expected[record["id"].tolist()].tolist(), abs=1e-6)
    assert len(set(record["id"].tolist())) == 5


def test_logprobs_may_be_of_what_was_drawn_from() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    rows = [
        row(temperature=0.5, top_k=4, num_logprobs=4, logprobs_of="choice", seed=1),
        row(temperature=0.5, top_k=4, num_logprobs=4, seed=1),
        row(temperature=0.0, num_logprobs=0, logprobs_of="choice"),
    ]
    drawn, raw, greedy = sample(logits, rows).logprobs
    record = np.frombuffer(drawn[4:], PAIR)
    assert np.exp(record["logprob"]).sum() == pytest.approx(1.0, abs=1e-5)
    top = (logits[0] / 0.5).topk(4)
    assert record["id"].tolist() == top.indices.tolist()
    assert record["logprob"].tolist() == pytest.approx(top.values.log_softmax(-1).tolist(), abs=1e-5)
    expected = logits[1].log_softmax(-1).topk(4).values.tolist()
    assert np.frombuffer(raw[4:], PAIR)["logprob"].tolist() == pytest.approx(expected, abs=1e-5)
    assert np.frombuffer(greedy, "<f4")[0] == pytest.approx(logits[2].log_softmax(-1).max().item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "num_known"), [(1000, 1000), (1000, 600), (70, 96)])
def test_what_a_mask_forbids_is_never_chosen(dtype: torch.dtype, vocab: int, num_known: int) -> None:
    """num_known: number of tokens that the mask covers; the others are forbidden."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, vocab, generator=generator).to(dtype)
    may = np.random.default_rng(1).random((4, -(-num_known // 32) * 32)) < 0.1
    may[:, num_known:] = False
    words = np.packbits(may, bitorder="little").view(np.int32).reshape(4, -1)
    allowed = torch.zeros(4, vocab, dtype=torch.bool)
    width = min(vocab, may.shape[1])
    allowed[:, :width] = torch.from_numpy(may)[:, :width]
    expected = logits.masked_fill(~allowed, -torch.inf)
    expected[2] = logits[2]
    rows = [SampleRow(Sampling(temperature=0.0), NOTHING, mask=None if i == 2 else words[i]) for i in range(4)]
    assert sample(logits.clone(), rows).ids.tolist() == expected.float().argmax(-1).tolist()
    drawn = sample(logits.clone(), [replace(row, sampling=Sampling(temperature=3.0, seed=9)) for row in rows]).ids
    assert all(expected[i, id_] > -torch.inf for i, id_ in enumerate(drawn))


def test_a_watermark_can_be_found() -> None:
    vocab = 400
    num_green = {True: 0, False: 0}
    generator = torch.Generator().manual_seed(9)
    for watermark in (True, False):
        text = [7]
        for _ in range(200):
            logits = torch.randn(1, vocab, generator=generator)
            wish = row(np.array([7]), np.array(text[1:]), seed=4, watermark=watermark)
            token = int(sample(logits, [wish]).ids[0])
            num_green[watermark] += token in set(watermark_ids(text[-1], vocab).tolist())
            text.append(token)
    # By chance 100 of 200 tokens are green, standard deviation 7; the watermark raises that to e^2 / (1 + e^2) = 88 %.
    assert num_green[True] > 150
    assert num_green[False] < 135


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "masked"])
def test_a_threshold_found_by_digits_is_that_of_sorting(kind: str) -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    logits = {"flat": logits / 50, "peaked": 5 * logits, "ties": logits.round(), "masked": logits}[kind]
    if kind == "masked":
        logits[:, ::3] = -torch.inf
    probs = logits.softmax(-1)
    p = torch.tensor([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
    keys = 0x3F800000 - probs.view(torch.int32)
    found = sampling._mass_threshold(keys, probs, p)
    for i in range(len(p)):
        order = keys[i].argsort(stable=True)
        reached = (probs[i][order].double().cumsum(-1) >= p[i].double()).nonzero()
        if len(reached):
            assert found[i] == keys[i][order[reached[0, 0]]]
        else:
            assert (keys[i] <= found[i]).all(), "all are kept"


def test_probabilities_add_up_to_the_same_in_any_order() -> None:
    """A GPU adds in any order; if sums depended on it, a seed would not give the same token in every run."""
    generator = torch.Generator().manual_seed(2)
    probs = (8 * torch.randn(4, 50_000, generator=generator)).softmax(-1)
    orders = [torch.randperm(50_000, generator=generator) for _ in range(8)]
    assert len({float(probs[0, order].double().cumsum(-1)[-1]) for order in orders}) > 1, "of floats they do not"
    assert len({int(sampling._mass(probs[0, order]).cumsum(-1)[-1]) for order in orders}) == 1
    p = torch.tensor([0.3, 0.9, 0.999, 1.0])
    found = [
        sampling._mass_threshold(0x3F800000 - probs[:, order].view(torch.int32), probs[:, order], p) for order in orders
    ]
    assert all(torch.equal(found[0], other) for other in found)


# ---------------------------------------------------------------- many rows


def test_probabilities_become_the_integers_that_float64_would_give() -> None:
    exponents = torch.randint(-149, 1, (20_000,), generator=torch.Generator().manual_seed(0))
    probs = torch.ldexp(torch.rand(20_000, generator=torch.Generator().manual_seed(1)), exponents).clamp(max=1.0)
    probs = torch.cat((probs, torch.tensor([0.0, 1.0, 2.0**-52, 2.0**-149])))
    assert torch.equal(sampling._mass(probs), (probs.double() * 2.0**52).long())


def test_rows_that_are_drawn_in_several_parts_get_the_same_tokens() -> None:
    vocab_size, num_rows = 60_000, sampling.DRAWN_AT_ONCE // 60_000 + 3
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(2)) * 3
    rows = [row(temperature=0.8, seed=i, num_logprobs=0, logprobs_of="choice") for i in range(num_rows)]
    at_once = sample(logits.clone(), rows)
    for i in (0, 1, num_rows - 4, num_rows - 3, num_rows - 1):
        alone = sample(logits[i : i + 1].clone(), rows[i : i + 1])
        assert (at_once.ids[i], at_once.logprobs[i]) == (alone.ids[0], alone.logprobs[0])


texts = st.lists(st.integers(0, 400), max_size=3 * MANY)


def dict_of(counts: TokenCounts) -> dict[int, int]:
    assert counts.total == counts.counts.sum()
    return dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))


def expected(*texts: list[int]) -> dict[int, int]:
    ids, counts = np.unique(np.concatenate([np.array(text, np.int32) for text in texts]), return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@given(texts, texts, st.lists(st.integers(0, 3 * MANY), max_size=5))
def test_counts_grow_with_the_text(prompt: list[int], output: list[int], ends: list[int]) -> None:
    adjustment = Adjustment(Sampling(), np.array(prompt, np.int32))
    for end in sorted(min(end, len(output)) for end in ends):
        seen = output[:end]
        assert dict_of(adjustment.output_counts(np.array(seen, np.int32))) == expected(seen)
        assert dict_of(adjustment.text_counts(np.array(seen, np.int32))) == expected(prompt, seen)
