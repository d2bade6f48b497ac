"""Finds how a model's sequences run unbatched, by running passes and comparing their logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.loading.checkpoint import CANNOT_RUN
from gpu_worker.model.logits_check import LogitsCheck, spread_of
from gpu_worker.model.trial import NUM_HEAD_ROWS, NUM_TOKENS, Trial, WatchedPass, watch_passes
from gpu_worker.one_by_one.account import Account, Continues, passes_of
from gpu_worker.one_by_one.passes import Kept, Passes

SHORT_TEXTS = ([0, 16, 17], [0, 1, 2])
"""Cut positions of short texts whose caches are measured; the first text's show the bytes per token."""

LONG_TOKENS = 288
"""Tokens of the long text, which is also computed in parts: some caches compress tokens a hundred positions back, and
some attention is randomized for texts longer than a chunk."""

NUM_LAST_TOKENS = 16
"""Tokens of the long text after its first chunk."""

WAYS: tuple[Continues, ...] = ("chunks", "tokens", "nothing")
"""Ways to continue from a cache, fastest first."""


def find_passes(
    module: PreTrainedModel, check: LogitsCheck, *, keeps_logits: bool, max_positions: int
) -> Passes | None:
    """Return how passes of single sequences reproduce `check`; None if they do not.

    keeps_logits: whether the module's forward takes logits_to_keep. max_positions: maximum tokens of a text, 0:
    unlimited.
    """
    passes, limit = Passes(module, keeps_logits=keeps_logits), check.limit(module.dtype)
    num = min(LONG_TOKENS, max_positions or LONG_TOKENS)
    text = torch.randint(module.config.get_text_config().vocab_size, (num,), generator=torch.Generator().manual_seed(1))
    text = text.to(module.device)
    for way in WAYS:
        passes.continues = way
        try:
            if way == "chunks":
                passes.learn(lambda: _run(passes, None, check.prompts[0])[1])
            if difference(passes, check) < limit and _measure(passes, text) < limit:
                return passes
        except CANNOT_RUN:  # raised by models that do not accept their own cache
            continue
    return None


def difference(passes: Passes, check: LogitsCheck) -> float:
    """Return the difference between the logits of prompts and the expected ones, as `spread_of` computes it.

    The prompts are computed in parts: their first half, part of the rest, then single tokens.
    """
    got: list[Tensor] = []
    expected: list[Tensor] = []
    for ids, right in zip(check.prompts, check.logits, strict=True):
        num = len(ids)
        for first, logits, _ in _in_parts(passes, ids, [0, num // 2 + 1, num - 2, num - 1, num]):
            got.append(logits)
            expected.append(right[first : first + len(logits)])
    return spread_of(got, expected)


def _measure(passes: Passes, text: Tensor) -> float:
    """Set `passes.account` from the cache sizes of a text and of shorter ones.

    Returns the difference between the logits of the text computed in parts and at once, as `spread_of` computes it.
    """
    num = len(text)
    middle = [num // 2] if passes.continues == "chunks" else []  # a pass per token would take too long
    short = [part for cuts in SHORT_TEXTS for part in _in_parts(passes, text, cuts)]
    parts = list(_in_parts(passes, text, [0, *middle, num - NUM_LAST_TOKENS, num - 1, num]))
    [whole] = _in_parts(passes, text, [0, num])
    if passes.continues != "nothing":
        short_one, *others = (size for _, _, size in (*short, *parts))
        passes.account = Account.through(short_one, whole[2], *others)
    right = whole[1]
    return spread_of([logits for _, logits, _ in parts], [right[i : i + len(logits)] for i, logits, _ in parts])


def _in_parts(passes: Passes, ids: Tensor, cuts: list[int]) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
    """Compute a text in parts between cuts.

    Yields, for each pass, its first position, its logits [n, V], and the tokens and bytes of the cache after it.
    """
    kept: Kept | None = None
    for start, end in pairwise(cuts):
        for first, behind in passes_of(passes.continues, start, end, is_wanted=True):
            logits, kept = _run(passes, kept if first else None, ids[first:behind])
            yield first, logits, (kept.end, kept.num_bytes)


def watch(passes: Passes) -> Trial:
    """Return the modules that passes call: linear layers in each pass, others only if they see all of its tokens.

    A pass has rows of one text only, so that all rows of any linear layer have the same adapter.
    """
    sizes = [(NUM_TOKENS, NUM_HEAD_ROWS), (2 * NUM_TOKENS + 1, NUM_HEAD_ROWS + 1)]
    if passes.continues == "chunks":
        sizes.append((NUM_TOKENS + 2, NUM_HEAD_ROWS))
    if passes.continues != "nothing":
        sizes.append((1, 1))
    return watch_passes(passes.module, list(_watched(passes, sizes)), any_rows=True)


def _watched(passes: Passes, sizes: list[tuple[int, int]]) -> Iterator[WatchedPass]:
    """Yield passes with the given numbers of tokens and rows of logits.

    Two start a text, the others continue the second. The caller runs each pass before it requests the next.
    """
    device = passes.module.device
    kept: Kept | None = None

    def run(num: int, rows: int, *, is_first: bool) -> None:
        nonlocal kept
        ids = torch.arange(num, device=device)
        kept = passes.run(None if is_first else kept, ids, torch.arange(rows, device=device))[1]

    num_text = 0
    for number, (num, rows) in enumerate(sizes):
        num_text = num if number < 2 else num_text + num
        call = partial(run, num, rows, is_first=number < 2)
        yield WatchedPass(num, rows, call, num_text)


def _run(passes: Passes, kept: Kept | None, ids: Tensor) -> tuple[Tensor, Kept]:
    with torch.inference_mode():
        return passes.run(kept, ids, torch.arange(len(ids), device=ids.device))
