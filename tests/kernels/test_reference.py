"""The reference against the formulas written out per token; the two share no indexing."""

from __future__ import annotations

import math

import torch
from helpers.kernel_cases import AttentionOptions, assert_close, attention_case, lora_case, token_slots

from lora_kernels.ops import BLOCK_TOKENS, PAGE_ROWS


def test_lora_add_is_the_sum_over_rank_rows() -> None:
    slots = token_slots("some base", 23, 4)
    case = lora_case(slots, [1, 3, 16, 40], 20, (12, 7), torch.float32, row_scales=True)
    scale_of_row = {}
    assert case.batch.row_scales is not None
    for i in range(case.batch.num_rows):
        scale_of_row[int(case.batch.rows[i])] = float(case.batch.row_scales[i])
    expected = [out.clone() for out in case.outs]
    for site, out in zip(case.sites, expected, strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            for j in range(int(case.table.ranks[slot, site.index])):
                pool_row = int(case.table.pages[slot, site.group, j // PAGE_ROWS]) * PAGE_ROWS + j % PAGE_ROWS
                hidden = case.x[token] @ site.a_rows[pool_row]
                scale = case.table.scales[slot, site.index] * scale_of_row[token]
                out[token] += scale * hidden * site.b_rows[pool_row]
    for actual, wanted in zip(case.run("reference"), expected, strict=True):
        assert_close(actual, wanted)


def test_paged_attention_is_a_softmax_over_visible_keys() -> None:
    options: AttentionOptions = {"window": 9, "softcap": 3.0, "sinks": True}
    case = attention_case((1, 5, 20), (18, 33, 20), (6, 2), (8, 4), torch.float32, **options)
    actual = case.run("reference")
    sinks = case.logits["sinks"]
    assert isinstance(sinks, torch.Tensor)
    for seq, kv_len in enumerate((18, 33, 20)):
        for token in range(int(case.batch.query_starts[seq]), int(case.batch.query_starts[seq + 1])):
            position = int(case.batch.positions[token])
            for head in range(6):
                total, value = math.exp(float(sinks[head])), torch.zeros(4)
                for key_position in range(max(0, position - 8), position + 1):
                    block = case.batch.block_tables[seq, key_position // BLOCK_TOKENS]
                    key = case.k_cache[block, head // 3, key_position % BLOCK_TOKENS]
                    logit = float(case.q[token, head] @ key) * 8**-0.5
                    weight = math.exp(3.0 * math.tanh(logit / 3.0))
                    total += weight
                    value += weight * case.v_cache[block, head // 3, key_position % BLOCK_TOKENS]
                assert_close(actual[token, head], value / total)
            assert position < kv_len
