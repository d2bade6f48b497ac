"""Samples tokens for a mixed batch: every row of logits has its own settings.

The order of one row's transformations:

    adjust   watermark, repetition, presence and frequency penalties, bias, banned tokens, ends of bad words
    mask     tokens allowed by its grammar and by its list of allowed tokens
    warp     temperature, top-k, top-p, min-p, typical
    draw     with noise that depends only on (seed, position); greedy at temperature 0

So a token depends neither on the batch nor on the worker. Probabilities are summed as integers (`_mass`): a GPU adds in
any order, so float sums would vary from run to run. Logprobs are those of the model's own distribution, before all
transformations, or, on request, of the distribution from which the token was drawn. Functions whose names end in an
underscore change their tensor in place. n is the number of rows, V the vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gpu_worker.memory import Arriving, send
from gpu_worker.sampling.adjustment import Adjustment
from gpu_worker.sampling.logprobs import LogprobRows
from lora_kernels import ops
from protocol.wire.messages import WHOLE, Sampling

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this count as 0: dividing by them would overflow."""

DRAWN_AT_ONCE = 1 << 24
"""Maximum number of logits drawn from at once: each temporarily takes some 40 bytes."""

TOP_P_CANDIDATES = 1024
"""Number of most likely tokens examined first for top-p; only flatter distributions need all tokens."""

WATERMARK_KEY, WATERMARK_GAMMA, WATERMARK_DELTA = 15485863, 0.5, 2.0
"""The generator's key, the share of favored tokens, and the amount added to their logits, as in TGI and LoRAX."""

_DIGITS = ((20, 11), (10, 10), (0, 10))
"""Shift and width of the digits into which a float's bits, without sign, are split."""

_MASS_BITS = 52
"""Probability 1 is a mass of 2 to this power."""

_ONE_BITS = 0x3F800000
"""The bit pattern of 1.0 in fp32."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)  # a frozen one takes three times as long to create, and each row of each step has one
class SampleRow:
    """The settings by which one row's token is chosen. Never changed."""

    sampling: Sampling
    output: np.ndarray  # int32; its length is the position of the next token
    banned: Sequence[int] | np.ndarray = ()  # ids that may not be chosen here
    mask: np.ndarray | None = None  # int32 [W], bits of the allowed ids; none beyond are allowed. None: all ids
    adjustment: Adjustment | None = None  # its sequence's; None if its request changes no logit


PLAIN = SampleRow(Sampling(temperature=0.0), np.empty(0, np.int32))
"""The shared row for requests that want the most likely token without further settings."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens chosen, on the host."""

    ids: np.ndarray  # int64 [n]
    finite: list[bool]  # False: the logits have no finite maximum, and the id is meaningless
    logprobs: list[bytes]  # a record of `logprobs.py` each, b"" if not requested
    failed: Mapping[int, BaseException] = field(default_factory=dict[int, BaseException])
    """Rows whose own settings caused an error; their ids are meaningless."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chosen tokens, on the device, and the logits from which they were chosen."""

    ids: Tensor  # int64 [n]
    finite: Tensor  # bool [n], as in `Sampled`
    logits: Tensor  # [n, V], adjusted and masked
    warped: dict[int, Tensor]  # fp32 [V] by row, for sampled rows whose request needs these logprobs
    failed: dict[int, BaseException]  # see `Sampled`

    def drawn_from(self, row: int) -> Tensor:
        """Return the logits [V] from which a row's token was chosen."""
        return self.warped.get(row, self.logits[row])


class PendingSample:
    """Tokens being chosen on the device. The next step may use them before the host knows them."""

    def __init__(self, chosen: Chosen, num_rows: int, logprobs: LogprobRows | None, recorded: Sequence[int]) -> None:
        """logprobs: of the rows in `recorded`, in that order; None: no row has any."""
        self.ids = chosen.ids  # int64 [n], on the device; an arbitrary valid id for failed rows
        self._failed, self._num_rows = chosen.failed, num_rows
        self._logprobs, self._recorded = logprobs, recorded
        self._arriving = Arriving([chosen.ids, chosen.finite])

    def result(self) -> Sampled:
        """Wait until the tokens are on the host, and return them."""
        ids, finite = self._arriving.arrays()
        records = [b""] * self._num_rows
        if self._logprobs is not None:
            for i, record in zip(self._recorded, self._logprobs.pack(), strict=True):
                records[i] = record
        return Sampled(ids, finite.tolist(), records, self._failed)


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Choose one token per row of logits [n, V], which may be changed, and wait for the result."""
    return begin_sample(logits, rows).result()


def begin_sample(logits: Tensor, rows: Sequence[SampleRow]) -> PendingSample:
    """Launch the choice of one token per row of logits [n, V], which may be changed. Does not block."""
    special = [i for i, row in enumerate(rows) if row is not PLAIN]
    if not special:  # the most common case
        return PendingSample(Chosen(*ops.argmax(logits), logits, {}, {}), len(rows), None, [])
    wanting = [i for i in special if rows[i].sampling.num_logprobs is not None]
    raw = logits[_index(wanting, logits.device)].float() if wanting else None  # before `choose` changes them
    chosen = choose(logits, rows, special)
    logprobs = None
    if raw is not None:
        for at, i in enumerate(wanting):
            if rows[i].sampling.logprobs_of == "choice":
                raw[at] = chosen.drawn_from(i)
        listed = [rows[i].sampling.logprob_token_ids for i in wanting]
        num_top = [
            0 if own else max(rows[i].sampling.num_logprobs or 0, 0) for i, own in zip(wanting, listed, strict=True)
        ]
        whole = [rows[i].sampling.vocabulary if rows[i].sampling.num_logprobs == WHOLE else 0 for i in wanting]
        ids = chosen.ids[_index(wanting, logits.device)]
        logprobs = LogprobRows(raw.log_softmax(-1), ids, num_top, listed, whole=whole)
    return PendingSample(chosen, len(rows), logprobs, wanting)


def choose(logits: Tensor, rows: Sequence[SampleRow], special: Sequence[int]) -> Chosen:
    """Choose a token per row of logits [n, V] on their device, setting logits of forbidden tokens to -inf.

    special: the rows that are not `PLAIN`. Does not wait for the device.
    """
    failed: dict[int, BaseException] = {}
    adjusted = [i for i in special if _is_adjusted(rows[i])]
    if adjusted:
        logits = logits.float().clone()
        for i in adjusted:
            try:
                _adjust_(logits[i], rows[i])
            except BaseException as error:  # noqa: BLE001  a request's edge: the others continue
                failed[i] = error
    masks = {i: mask for i in special if (mask := rows[i].mask) is not None}
    if masks:
        _mask_(logits, masks)
    ids, finite = ops.argmax(logits)
    drawn = [i for i in special if rows[i].sampling.temperature >= GREEDY_TEMPERATURE]
    warped: dict[int, Tensor] = {}
    most = max(1, DRAWN_AT_ONCE // logits.shape[-1])
    for part in (drawn[first : first + most] for first in range(0, len(drawn), most)):
        index, drawn_rows = _index(part, logits.device), [rows[i] for i in part]
        numbers = _warp(logits[index].float(), drawn_rows)
        ids[index] = _draw(numbers, drawn_rows)
        warped |= {i: numbers[at] for at, i in enumerate(part) if rows[i].sampling.logprobs_of == "choice"}
    return Chosen(ids, finite, logits, warped, failed)


def _index(rows: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return row numbers as an index tensor on the device; indexing with a list would block the host."""
    return send(np.asarray(rows, np.int64), device)


def _floats(values: Sequence[float], device: torch.device) -> Tensor:
    """Return values as an fp32 tensor on the device."""
    return send(np.array(values, np.float32), device)


# ---------------------------------------------------------------- adjust


def _is_adjusted(row: SampleRow) -> bool:
    """Return whether `_adjust_` would change a row's logits."""
    return len(row.banned) > 0 or (row.adjustment is not None and row.adjustment.changes(len(row.output)))


def _adjust_(logits: Tensor, row: SampleRow) -> None:
    """Apply watermark, penalties, bias and bans to one row of fp32 logits [V]."""
    if row.adjustment is not None:
        _apply_(row.adjustment, logits, row)
    if len(row.banned):
        logits.index_fill_(0, _index(row.banned, logits.device), -torch.inf)


def _apply_(adjustment: Adjustment, logits: Tensor, row: SampleRow) -> None:
    """Apply watermark, penalties and bias to one row of fp32 logits [V]."""
    s, device = row.sampling, logits.device
    if s.watermark:
        last = row.output[-1] if len(row.output) else adjustment.prompt[-1]
        logits[send(watermark_ids(int(last), len(logits)).numpy(), device)] += WATERMARK_DELTA
    if s.repetition_penalty != 1.0:
        seen = send(adjustment.repeated(row.output), device)
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / s.repetition_penalty, scores * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        # OpenAI counts tokens in the output; LoRAX uses a token's share of prompt and output.
        is_share = s.penalties == "lorax"
        counted = adjustment.text_counts(row.output) if is_share else adjustment.output_counts(row.output)
        weights = counted.counts / counted.total if is_share else counted.counts
        penalty = s.presence_penalty + s.frequency_penalty * weights
        logits[send(counted.ids, device)] -= send(penalty.astype(np.float32), device)
    if s.logit_bias:
        logits[send(adjustment.bias_ids, device)] += send(adjustment.bias, device)


def watermark_ids(last: int, vocab_size: int) -> Tensor:
    """Return the tokens that a watermark favors after token `last`: int64 [vocab_size / 2].

    Kirchenbauer et al., arXiv 2301.10226, with the key and generator of TGI and LoRAX, so that their detectors work.
    """
    generator = torch.Generator().manual_seed(WATERMARK_KEY * last)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * WATERMARK_GAMMA)]


# ---------------------------------------------------------------- mask


@torch.inference_mode()
def _mask_(logits: Tensor, masks: Mapping[int, np.ndarray]) -> None:
    """Set the logits [n, V] of forbidden tokens to -inf. masks: by row."""
    words = np.zeros((len(masks), -(-logits.shape[-1] // 32)), np.int32)
    for own, mask in zip(words, masks.values(), strict=True):
        own[: len(mask)] = mask[: len(own)]
    ops.mask_logits_(logits, _index(list(masks), logits.device), send(words, logits.device))


# ---------------------------------------------------------------- warp


def _warp(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return fp32 logits [n, V] divided by the temperature, and -inf for tokens that may not be drawn."""
    settings = [row.sampling for row in rows]
    logits = logits / _floats([s.temperature for s in settings], logits.device)[:, None]
    _keep_top_k_(logits, [s.top_k for s in settings])
    _keep_top_p_(logits, [s.top_p for s in settings])
    _keep_min_p_(logits, [s.min_p for s in settings])
    _keep_typical_(logits, [s.typical_p for s in settings])
    return logits


def _keep_top_k_(logits: Tensor, top_k: list[int]) -> None:
    """Set all but the k largest of each row to -inf. Ties with the k-th stay. k = 0 keeps all."""
    limited = [i for i, k in enumerate(top_k) if 0 < k < logits.shape[-1]]
    if not limited:
        return
    index, k = _index(limited, logits.device), np.array([top_k[i] for i in limited])
    top = logits[index].topk(int(k.max()), dim=-1).values
    threshold = top.gather(-1, send(k, logits.device)[:, None] - 1)
    logits[index] = logits[index].masked_fill(logits[index] < threshold, -torch.inf)


def _keep_top_p_(logits: Tensor, top_p: list[float]) -> None:
    """Set all but the most likely tokens that together reach p to -inf. Ties with the last kept token stay.

    Holtzman et al., arXiv 1904.09751.
    """
    limited = [i for i, p in enumerate(top_p) if p < 1.0]
    if not limited:
        return
    index, p = _index(limited, logits.device), _floats([top_p[i] for i in limited], logits.device)
    probs = logits[index].softmax(-1)
    threshold = _least_likely(probs, p) if logits.device.type == "cpu" else _least_likely_of_all(probs, p)
    logits[index] = logits[index].masked_fill(probs < threshold, -torch.inf)


def _least_likely(probs: Tensor, p: Tensor) -> Tensor:
    """Return the probability of the last token that top-p keeps: [n, 1], for probs [n, V] and p [n].

    Examines the most likely tokens first, which on a CPU takes a tenth of the time. This requires knowing on the host
    which rows are flat; on another device the host would have to wait.
    """
    top = probs.topk(min(TOP_P_CANDIDATES, probs.shape[-1]), dim=-1).values
    threshold = _nucleus_threshold(top, p)
    flat = (_mass(top).sum(-1) < _mass(p)).nonzero()[:, 0]
    if len(flat):
        threshold[flat] = _least_likely_of_all(probs[flat], p[flat])
    return threshold


def _least_likely_of_all(probs: Tensor, p: Tensor) -> Tensor:
    """Return the same as `_least_likely`, bit for bit, from the masses of all tokens."""
    keys = _ONE_BITS - probs.view(torch.int32)  # more likely tokens have smaller keys
    return (_ONE_BITS - _mass_threshold(keys, probs, p)).view(torch.float32)


def _nucleus_threshold(probs: Tensor, p: Tensor) -> Tensor:
    """Return the probability of the last token that top-p keeps: [n, 1], for descending probs [n, m] and p [n]."""
    mass = _mass(probs)
    before = mass.cumsum(-1) - mass
    num_kept = (before < _mass(p)[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return probs.gather(-1, num_kept - 1)


def _keep_min_p_(logits: Tensor, min_p: list[float]) -> None:
    """Set tokens less likely than min_p times the most likely to -inf. Nguyen et al., arXiv 2407.01082."""
    if not any(min_p):
        return
    floor = _floats(min_p, logits.device).log()  # log 0 is -inf, which keeps all
    logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + floor[:, None], -torch.inf)


def _keep_typical_(logits: Tensor, typical_p: list[float]) -> None:
    """Keep the tokens whose surprisal is closest to the entropy, until together they reach typical_p.

    Meister et al., arXiv 2202.00666.
    """
    limited = [i for i, p in enumerate(typical_p) if p < 1.0]
    if not limited:
        return
    index, p = _index(limited, logits.device), _floats([typical_p[i] for i in limited], logits.device)
    logp = logits[index].log_softmax(-1)
    probs = logp.exp()
    entropy = -(probs * logp).nan_to_num(0.0).sum(-1, keepdim=True)
    distance = (-logp - entropy).abs()
    threshold = _mass_threshold(distance.view(torch.int32), probs, p).view(torch.float32)
    logits[index] = logits[index].masked_fill(distance > threshold, -torch.inf)


def _mass_threshold(keys: Tensor, probs: Tensor, p: Tensor) -> Tensor:
    """Return each row's smallest key up to which probabilities sum to p: int32 [n, 1]; all ones if they never do.

    keys: int32 [n, V], not negative: bits of floats, which sort like the floats. probs: fp32 [n, V]. p: fp32 [n]. The
    key is found digit by digit, in a tenth of the time of sorting a vocabulary.
    """
    wanted = _mass(p).clamp(min=1)[:, None]
    found = torch.zeros(len(keys), 1, dtype=torch.int32, device=keys.device)
    before = torch.zeros(len(keys), 1, dtype=torch.int64, device=keys.device)  # mass of smaller keys
    mass = _mass(probs)
    for shift, width in _DIGITS:
        digits = ((keys >> shift) & ((1 << width) - 1)).long()
        mass = mass.where((keys >> (shift + width)) == found, 0)
        by_digit = mass.new_zeros(len(keys), 1 << width).scatter_add_(-1, digits, mass)
        upto = by_digit.cumsum(-1) + before
        digit = (upto < wanted).sum(-1, keepdim=True).clamp(max=(1 << width) - 1)
        before = upto.gather(-1, digit) - by_digit.gather(-1, digit)
        found = (found << width) | digit.int()
    return found


def _mass(probs: Tensor) -> Tensor:
    """Return fp32 probabilities as int64, whose sums are exact. Scaling floats by a power of two is exact."""
    return (probs * float(1 << _MASS_BITS)).long()


# ---------------------------------------------------------------- draw


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Draw from fp32 logits [n, V] by inverting the cumulative distribution in id order: int64 [n].

    A row that is not finite yields an arbitrary id.
    """
    cumulative = _mass(logits.softmax(-1)).cumsum_(-1)
    seeds = np.array([row.sampling.seed & 0xFFFFFFFFFFFFFFFF for row in rows], np.uint64)
    positions = np.array([len(row.output) for row in rows], np.uint64)
    u = send(uniforms(seeds, positions), logits.device)
    drawn = (u[:, None] * cumulative[:, -1:]).long()
    ids = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
    return ids.clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return float64 [n] in [0, 1), a hash of (seed, position), uint64 [n] each.

    Two rounds of the splitmix64 finalizer (Steele et al. 2014, doi 10.1145/2660193.2660195); 48 bits are used.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds.astype(np.uint64) + _GOLDEN)
        state = _mix(state ^ (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(16)).astype(np.float64) / float(1 << 48)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
