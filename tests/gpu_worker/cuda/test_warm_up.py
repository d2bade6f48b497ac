"""The warm-up launches every kernel variant, as Triton distinguishes them, that a random step launches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.engine import triton_aot
from gpu_worker.cuda.warm_up import WarmUpStep, warm_up_steps
from lora_kernels.experts import ExpertPages, expert_batch, order_by_expert
from lora_kernels.ops import AdapterTable, LoraSite, build_attention_batch, build_lora_batch
from lora_kernels.triton_ops.attention import plan_attention
from lora_kernels.triton_ops.launch import Launch
from lora_kernels.triton_ops.lora import plan_lora

MAX_PROMPT_ROWS = 256
TABLE_SLOTS = 1000
HEAD = 32_000


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Planner:
    """Plans the launches of a step on a GPU without running them."""

    def __init__(self, model: triton_aot.Model, target: triton_aot.Target) -> None:
        self.model, self.target = model, target
        self.known: dict[object, object] = {}  # hashable launch arguments -> variant
        self.seen: set[tuple[int, bool]] = set()  # (tokens, has scales) of steps whose experts were planned
        self.table = AdapterTable(
            meta(TABLE_SLOTS, 9, dtype=torch.int32), meta(TABLE_SLOTS, 9, dtype=torch.float32),
            meta(TABLE_SLOTS, 2, 4, dtype=torch.int32),
        )  # fmt: skip

    def variants(self, step: WarmUpStep) -> set[object]:
        return {self.variant(launch) for launch in self.launches(step)}

    def variant(self, launch: Launch) -> object:
        """Return the key under which Triton compiles the kernel of a launch."""
        plain = tuple(_plain(value) for value in launch.args.values())
        key = (launch.kernel.fn.__name__, launch.limits, plain)
        if key not in self.known:
            source, options = triton_aot.source_of(launch, self.target.gpu)
            self.known[key] = (source.hash(), str(options))
        return self.known[key]

    def launches(self, step: WarmUpStep) -> Iterator[Launch]:
        model, device, num_tokens = self.model, self.target.device, step.num_tokens
        lens = step.num_new
        batch = build_attention_batch(lens, lens, np.zeros((len(lens), -(-int(lens.max()) // 16)), np.int32), "meta")
        q, out = meta(num_tokens, model.num_heads, model.head_dim), meta(num_tokens, model.num_heads, model.head_dim_v)
        k_cache = meta(99, model.num_kv_heads, 16, model.head_dim)
        v_cache = meta(99, model.num_kv_heads, 16, model.head_dim_v)
        yield from plan_attention(out, q, k_cache, v_cache, batch, model.logits, device)
        widths = model.num_heads * model.head_dim, *2 * (model.num_kv_heads * model.head_dim,)
        yield from self.lora(step.slots, step, model.hidden, widths)
        yield from self.lora(step.slots, step, model.intermediate, (model.hidden,))
        yield from self.experts(step)
        yield from self.lora(
            step.slots if step.through_head else step.slots[np.cumsum(lens) - 1], step, model.hidden, (HEAD,)
        )

    def experts(self, step: WarmUpStep) -> Iterator[Launch]:
        """Yield the LoRA launches of a mixture's two products, once per size, for steps with an adapter."""
        form = (step.num_tokens, step.has_scales)
        if self.model is not triton_aot.MODELS[0] or (step.slots < 0).all() or form in self.seen:
            return
        self.seen.add(form)
        num, ids = 32, meta(step.num_tokens, 4, dtype=torch.int64)
        slots, firsts = meta(step.num_tokens, dtype=torch.int32), meta(TABLE_SLOTS, dtype=torch.int32)
        order = order_by_expert(ids, slots, num, TABLE_SLOTS)
        for k, n in ((self.model.hidden, 1536), (768, self.model.hidden)):
            virtual = 3 * num + 1
            table = AdapterTable(
                meta(virtual, 1, dtype=torch.int32), meta(virtual, 1, dtype=torch.float32),
                meta(virtual, 1, 3, dtype=torch.int32),
            )  # fmt: skip
            site = LoraSite(0, 0, meta(3 * num * 16, k), meta(3 * num * 16, n))
            scales = meta(step.num_tokens, dtype=torch.float32) if step.has_scales else None
            batch = expert_batch(order, ExpertPages(site, table, num), firsts, scales)
            num_pairs = batch.num_tokens
            yield from plan_lora([meta(num_pairs, n)], meta(num_pairs, k), [site], table, batch, self.target.device)

    def lora(self, slots: np.ndarray, step: WarmUpStep, k: int, widths: tuple[int, ...]) -> Iterator[Launch]:
        scales = np.full(len(slots), 0.5, np.float32) if step.has_scales else None
        batch = build_lora_batch(slots, "meta", scales)
        if batch is not None:
            sites = [LoraSite(i, 0, meta(64, k), meta(64, width)) for i, width in enumerate(widths)]
            outs = [meta(len(slots), width) for width in widths]
            yield from plan_lora(outs, meta(len(slots), k), sites, self.table, batch, self.target.device)


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def random_step(rng: np.random.Generator, most_seqs: int, most_tokens: int, num_slots: int) -> WarmUpStep:
    """Return a step of decodes, chunks and short draft checks, with few or many adapters, and perhaps the base."""
    num_seqs = int(2 ** rng.uniform(0, np.log2(most_seqs + 0.99)))
    num_new = np.ones(num_seqs, np.int64)
    if rng.random() < 0.3 and 5 * num_seqs <= most_tokens:
        num_new += rng.integers(0, 5, num_seqs)
    room = most_tokens - int(num_new.sum())
    for i in range(min(num_seqs, int(rng.integers(0, 4)))):
        more = int(2 ** rng.uniform(0, np.log2(room))) if room > 1 else 0
        num_new[i] += more
        room -= more
    num_adapters = int(2 ** rng.uniform(0, np.log2(num_slots + 0.99)))
    slots = rng.integers(-1 if rng.random() < 0.5 else 0, num_adapters, num_seqs).astype(np.int32)
    through_head = bool(num_new.sum() <= MAX_PROMPT_ROWS and rng.random() < 0.5)
    return WarmUpStep(num_new, np.repeat(slots, num_new), rng.random() < 0.3, through_head)


FULL = (256, 2048, 300)


@pytest.mark.parametrize(
    ("target", "sizes"),
    [*((target, FULL) for target in triton_aot.TARGETS[:3]),
     *((triton_aot.TARGETS[1], sizes) for sizes in ((64, 512, 20), (1, 512, 1)))],
    ids=str,
)  # fmt: skip
def test_no_step_compiles_a_kernel_after_the_warm_up(target: triton_aot.Target, sizes: tuple[int, int, int]) -> None:
    """sizes: maximum sequences and tokens of a step, and slots of the adapter pool."""
    for model in triton_aot.MODELS[:3]:
        planner = Planner(model, target)
        steps = list(warm_up_steps(*sizes, MAX_PROMPT_ROWS))
        assert all(step.num_tokens <= sizes[1] and len(step.num_new) <= sizes[0] for step in steps)
        warm = set[object]().union(*map(planner.variants, steps))
        rng = np.random.default_rng(0)
        for _ in range(100):
            step = random_step(rng, *sizes)
            assert planner.variants(step) <= warm, step
        few = set[object]().union(*map(planner.variants, steps[: len(steps) // 4]))
        assert few < warm, "steps of one form reach all kernels: the test shows nothing"
