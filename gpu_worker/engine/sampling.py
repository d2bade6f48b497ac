"""Choosing tokens for a mixed batch. The noise of a token is a function of (seed, position) alone.

Order: watermark, repetition, frequency and presence penalties, bias, grammar, temperature, top-k, top-p, min-p,
typical. Temperature 0 is greedy. Logprobs are of the model's own distribution, before any of these, or of the last one
if a request wants that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.memory import send
from lora_kernels import ops
from protocol.wire.messages import Sampling

TOP_P_CANDIDATES = 1024
"""Most likely tokens looked at first for top-p; only a flatter distribution is sorted whole."""

GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature is 0: dividing by it would overflow."""

WATERMARK_KEY, WATERMARK_GAMMA, WATERMARK_DELTA = 15485863, 0.5, 2.0

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sequence's wishes."""

    sampling: Sampling
    prompt: np.ndarray  # int32
    output: np.ndarray  # int32; its length is the position of the token to choose
    banned: tuple[int, ...] = ()  # ids that may not be chosen now
    mask: np.ndarray | None = None  # int32 [W], bits of the ids that may be chosen, none beyond; None: all ids


@dataclass(frozen=True, slots=True)
class Sampled:
    ids: np.ndarray  # int64 [n]
    finite: np.ndarray  # bool [n]; False: the logits hold no usable maximum, the id means nothing
    logprobs: list[bytes]  # `messages.logprob_record_bytes` each, b"" where none were asked for


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Choose one token per row of logits [n, V], which may change. Waits for the device once, but for logprobs."""
    wanting = [i for i, row in enumerate(rows) if row.sampling.num_logprobs is not None]
    shown = logits[_index(wanting, logits.device)].float() if wanting else None  # those whose logprobs are recorded
    chosen = choose(logits, rows)
    host_ids, host_finite = torch.stack((chosen.ids, chosen.finite)).cpu().numpy()
    records = [b""] * len(rows)
    if shown is not None:
        for at, i in enumerate(wanting):
            if rows[i].sampling.logprobs_of == "choice":
                shown[at] = chosen.drawn_from(i)
        nums = [rows[i].sampling.num_logprobs or 0 for i in wanting]
        packed = pack_logprobs(shown.log_softmax(-1), nums, host_ids[wanting])
        for i, record in zip(wanting, packed, strict=True):
            records[i] = record
    return Sampled(host_ids, host_finite.astype(bool), records)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens on the device, and what they were chosen from."""

    ids: Tensor  # int64 [n]
    finite: Tensor  # bool [n], as in `Sampled`
    logits: Tensor  # [n, V], adjusted
    warped: Tensor | None  # fp32 [m, V], tempered and cut, of the rows that are drawn
    row_of: dict[int, int]  # row -> its place in `warped`

    def drawn_from(self, row: int) -> Tensor:
        """Return the logits [V] that a row's token was chosen by."""
        return self.logits[row] if self.warped is None or row not in self.row_of else self.warped[self.row_of[row]]


def choose(logits: Tensor, rows: Sequence[SampleRow]) -> Chosen:
    """Choose a token per row of logits [n, V], on their device; what grammars do not allow becomes -inf in them.

    The host waits for the device only where top-p must know whether a distribution is flat.
    """
    device = logits.device
    masked = [i for i, row in enumerate(rows) if row.mask is not None]
    if any(_changes_logits(row) for row in rows):
        logits = logits.float().clone()
        for i, row in enumerate(rows):
            if _changes_logits(row):
                _adjust_(logits[i], row)
    if masked:
        _mask_(logits, masked, rows)
    ids, finite = ops.argmax(logits)
    random = [i for i, row in enumerate(rows) if row.sampling.temperature >= GREEDY_TEMPERATURE]
    warped = None
    if random:
        index = _index(random, device)
        drawn_rows = [rows[i] for i in random]
        warped = _warp(logits[index].float(), drawn_rows)
        ids[index] = _draw(warped, drawn_rows).clamp(max=logits.shape[-1] - 1)  # where not finite anything may come
    return Chosen(ids, finite, logits, warped, {row: at for at, row in enumerate(random)})


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Return row numbers as an index on the device; a list would be copied there while the host waits."""
    return send(np.array(rows, np.int64), device)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return float64 [n] in [0, 1), a hash of (seed, position): two rounds of splitmix64's finalizer, 48 bits kept."""
    with np.errstate(over="ignore"):
        state = _mix(seeds.astype(np.uint64) + _GOLDEN)
        state = _mix(state ^ (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(16)).astype(np.float64) / float(1 << 48)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _changes_logits(row: SampleRow) -> bool:
    s = row.sampling
    return bool(
        row.banned
        or s.logit_bias
        or s.watermark
        or s.repetition_penalty != 1.0
        or ((s.presence_penalty or s.frequency_penalty) and (len(row.output) or s.penalties == "lorax"))
    )


def _adjust_(logits: Tensor, row: SampleRow) -> None:
    """Apply penalties, bias and bans to one row of fp32 logits [V], in place."""
    s = row.sampling
    device = logits.device
    if s.watermark:
        last = row.output[-1] if len(row.output) else row.prompt[-1]
        logits[watermark_ids(int(last), len(logits)).to(device)] += WATERMARK_DELTA
    if s.repetition_penalty != 1.0:
        seen = send(np.unique(np.concatenate((row.prompt, row.output))).astype(np.int64), device)
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / s.repetition_penalty, scores * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        # OpenAI counts what was written, LoRAX the share of a token in all text so far, prompt included.
        counted = row.output if s.penalties == "openai" else np.concatenate((row.prompt, row.output))
        unique, counts = np.unique(counted, return_counts=True)
        weights = counts if s.penalties == "openai" else counts / len(counted)
        penalty = s.presence_penalty + s.frequency_penalty * weights
        logits[send(unique.astype(np.int64), device)] -= send(penalty.astype(np.float32), device)
    if s.logit_bias:
        biases = send(np.array(list(s.logit_bias.values()), np.float32), device)
        logits[_index(list(s.logit_bias), device)] += biases
    if row.banned:
        logits.index_fill_(0, _index(row.banned, device), -torch.inf)


@torch.inference_mode()
def _mask_(logits: Tensor, masked: list[int], rows: Sequence[SampleRow]) -> None:
    """Set what grammars do not allow to -inf in the masked rows of logits [n, V], in place."""
    words = np.zeros((len(masked), -(-logits.shape[-1] // 32)), np.int32)
    for own, i in zip(words, masked, strict=True):
        mask = rows[i].mask
        if mask is not None:
            own[: len(mask)] = mask[: len(own)]
    ops.mask_logits_(logits, _index(masked, logits.device), send(words, logits.device))


def watermark_ids(last: int, vocab_size: int) -> Tensor:
    """Return the tokens that a watermark favours after token `last`: int64 [vocab_size / 2].

    Kirchenbauer et al., arXiv 2301.10226, with TGI's and LoRAX's key and generator, so that their detectors find it.
    """
    generator = torch.Generator().manual_seed(WATERMARK_KEY * last)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * WATERMARK_GAMMA)]


def _warp(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return what tokens are drawn from, of fp32 logits [n, V]: tempered, all that may not be drawn at -inf."""
    settings = [row.sampling for row in rows]
    temperature = send(np.array([s.temperature for s in settings], np.float32), logits.device)
    logits = logits / temperature[:, None]
    _keep_top_k_(logits, [s.top_k for s in settings])
    _keep_top_p_(logits, [s.top_p for s in settings])
    _keep_min_p_(logits, [s.min_p for s in settings])
    _keep_typical_(logits, [s.typical_p for s in settings])
    return logits


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Draw from fp32 logits [n, V] by inverting the cumulative distribution in the order of ids: int64 [n]."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    seeds = np.array([row.sampling.seed & 0xFFFFFFFFFFFFFFFF for row in rows], np.uint64)
    positions = np.array([len(row.output) for row in rows], np.uint64)
    u = send(uniforms(seeds, positions), logits.device)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _keep_top_k_(logits: Tensor, top_k: list[int]) -> None:
    """Set all but the k largest of each row to -inf. Ties with the k-th stay."""
    vocab = logits.shape[-1]
    chosen = [i for i, k in enumerate(top_k) if 0 < k < vocab]
    if not chosen:
        return
    index, wanted = _index(chosen, logits.device), np.array([top_k[i] for i in chosen])
    ks = send(wanted, logits.device)
    top = logits[index].topk(int(wanted.max()), dim=-1).values
    threshold = top.gather(-1, ks[:, None] - 1)
    logits[index] = logits[index].masked_fill(logits[index] < threshold, -torch.inf)


def _keep_top_p_(logits: Tensor, top_p: list[float]) -> None:
    """Set all but the most likely tokens that together reach p to -inf. Ties with the last of them stay."""
    chosen = [i for i, p in enumerate(top_p) if p < 1.0]
    if not chosen:
        return
    index = _index(chosen, logits.device)
    probs = logits[index].softmax(-1)
    p = send(np.array([top_p[i] for i in chosen], np.float32), logits.device)
    top = probs.topk(min(TOP_P_CANDIDATES, probs.shape[-1]), dim=-1).values
    threshold = _nucleus_threshold(top, p)
    flat = (top.sum(-1) < p).nonzero()[:, 0]
    if len(flat):
        threshold[flat] = _nucleus_threshold(probs[flat].sort(dim=-1, descending=True).values, p[flat])
    logits[index] = logits[index].masked_fill(probs < threshold, -torch.inf)


def _nucleus_threshold(probs: Tensor, p: Tensor) -> Tensor:
    """Return the probability of the last token that is kept: [n, 1], of descending probs [n, m]."""
    before = probs.cumsum(-1) - probs
    num_kept = (before < p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return probs.gather(-1, num_kept - 1)


def _keep_min_p_(logits: Tensor, min_p: list[float]) -> None:
    """Set tokens less likely than min_p times the likeliest to -inf."""
    if not any(min_p):
        return
    floor = send(np.array(min_p, np.float32), logits.device).log()  # log 0 is -inf: keeps all
    logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + floor[:, None], -torch.inf)


def _keep_typical_(logits: Tensor, typical_p: list[float]) -> None:
    """Keep the tokens whose surprise is closest to the entropy, until they reach typical_p together."""
    chosen = [i for i, p in enumerate(typical_p) if p < 1.0]
    if not chosen:
        return
    index = _index(chosen, logits.device)
    logp = logits[index].log_softmax(-1)
    probs = logp.exp()
    entropy = -(probs * logp).nan_to_num(0.0).sum(-1, keepdim=True)
    distance, order = (-logp - entropy).abs().sort(dim=-1, stable=True)
    p = send(np.array([typical_p[i] for i in chosen], np.float32), logits.device)
    num_kept = (probs.gather(-1, order).cumsum(-1) < p[:, None]).sum(-1, keepdim=True)
    threshold = distance.gather(-1, num_kept.clamp(max=logits.shape[-1] - 1))
    logits[index] = logits[index].masked_fill((-logp - entropy).abs() > threshold, -torch.inf)


def pack_logprobs(logprobs: Tensor, nums: Sequence[int], ids: np.ndarray) -> list[bytes]:
    """Pack the logprob of a token (int64 [n]) and the top `nums` ones of each row of [n, V]."""
    chosen = logprobs.gather(-1, torch.from_numpy(ids).to(logprobs.device)[:, None])[:, 0].cpu().numpy()
    values, tokens = logprobs.topk(max(nums), dim=-1)
    top = np.empty((len(nums), max(nums)), np.dtype([("id", "<i4"), ("logprob", "<f4")]))
    top["id"], top["logprob"] = tokens.cpu().numpy(), values.cpu().numpy()
    return [
        chosen[i].astype("<f4").tobytes() + top[i, :num].tobytes() for i, num in enumerate(nums)
    ]  # fmt: skip
