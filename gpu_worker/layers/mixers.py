"""Layers that keep a state in place of keys and values: convolutions, gated delta rules, state space scans.

Transformers' mixers work token by token except for a few functions of their module, such as `causal_conv1d_fn`, which
process a whole sequence. There is no registration interface as for attention, so these functions are replaced. In a
step, the replacements run each sequence's tokens from its state; outside of steps they call the original.

The computation is transformers' own: its function for several tokens, and its function for one token, batched over
sequences. These use `flash-linear-attention`, `mamba-ssm` and `causal-conv1d` if installed. On a CPU, convolutions,
delta rules and selective scans are native operations of `lora_kernels`.

A step packs T tokens of all sequences, in runs. A state belongs to one sequence and one call.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_worker.memory import zeros
from lora_kernels import ops

SILU = ("silu", "swish")
"""Names of the activation that `ops.causal_conv` supports."""

DELTA_INPUTS = ("query", "key", "value", "g", "beta")
"""Arguments of a delta rule that have a row per token."""

SCAN_INPUTS = ("hidden_states", "dt", "B", "C")
"""Arguments of Mamba2's scan that have a row per token."""

UNLIMITED = (0.0, float("inf"))
"""The `dt_limit` of a scan without limits on its step sizes."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one sequence in a step."""

    start: int  # its first row
    end: int
    read: int  # slot of its initial state
    write: int  # slot of its final state
    num_prompt: int  # number of its prompt tokens, which come first
    save: int = -1  # another slot for the final state; -1: none


@dataclass(frozen=True, slots=True)
class Singles:
    """Output tokens of sequences with one token in the step, computed together."""

    rows: Tensor  # int64 [D]
    reads: Tensor  # int64 [D], slots, as in `Run`
    writes: Tensor  # int64 [D]


@dataclass(frozen=True, slots=True)
class StateBatch:
    """The runs of a step. Those of several tokens are computed one after another, in order."""

    singles: Singles | None  # None: no single-token runs
    runs: list[Run]
    copies: tuple[Tensor, Tensor] | None  # int64 [n] each: source and target slots to copy after the step
    all_runs: Tensor  # single-token and longer runs, in the form of `ops.delta_rule`

    @classmethod
    def of(
        cls, singles: list[tuple[int, int, int]], runs: list[Run], copies: list[tuple[int, int]], device: torch.device
    ) -> StateBatch:
        """singles: row, slot to read and slot to write of each single-token run. copies: (source slot, target slot)."""
        table = torch.tensor(singles, dtype=torch.int64).reshape(-1, 3).T.to(device)
        pairs = torch.tensor(copies, dtype=torch.int64).reshape(-1, 2).T.to(device)
        rows = [(row, row + 1, read, write, -1) for row, read, write in singles]
        rows += [(run.start, run.end, run.read, run.write, run.save) for run in runs]
        all_runs = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        return cls(Singles(*table) if singles else None, runs, (pairs[0], pairs[1]) if copies else None, all_runs)

    @property
    def is_decode(self) -> bool:
        """Whether the step consists of single tokens only."""
        return not self.runs


class MixerCall(ABC):
    """One call of a mixer's function in each forward pass, with the states of all sequences.

    Each subclass handles one function: the shape of its state, and how it computes a step's runs.
    """

    def __init__(self, many: Callable[..., Any], one: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
        """many, one: transformers' functions. args, kwargs: the arguments of `many` in the trial run."""
        self.many = many
        self.one = one
        self.shape, self.dtype = self.state_of(args, kwargs)
        self.states: Tensor | None = None  # [slots, …]

    @property
    def tells_prompts_apart(self) -> bool:
        """Whether prompt tokens are computed differently from the same tokens in an output."""
        return False

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def allocate(self, num_slots: int, device: torch.device) -> None:
        """Allocate `num_slots` states, all zero, which is the initial state of a sequence."""
        self.states = zeros((num_slots, *self.shape), self.dtype, device)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy states between slots; sources, targets: int64 [n]."""
        assert self.states is not None
        self.states[targets] = self.states[sources]

    def put(self, run: Run, state: Tensor) -> None:
        """Store the final state of a run."""
        assert self.states is not None
        self.states[run.write] = state
        if run.save >= 0:
            self.states[run.save] = state

    @abstractmethod
    def run(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the function for a step, and update the state of every run."""

    @abstractmethod
    def state_of(self, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a state."""


class Convolution(MixerCall):
    """causal_conv1d_fn(x [1, C, T], weight [C, K], bias, activation): a state is the last K inputs [K, C]."""

    def state_of(self, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a state."""
        bound = _bind(self.many, args, kwargs)
        return tuple(bound["weight"].shape[::-1]), bound["hidden_states"].dtype

    def run(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the convolved x [1, C, T]."""
        bound = _bind(self.many, args, kwargs)
        x, weight, activation = bound["hidden_states"], bound["weight"], bound.get("activation")
        if not ops.is_native(x) or weight.dtype != x.dtype or activation not in (None, *SILU):
            return self.by_transformers(batch, args, kwargs)
        bias, silu = bound.get("bias"), activation in SILU
        assert self.states is not None
        return ops.causal_conv(x[0].T, weight, self.states, batch.all_runs, bias=bias, silu=silu).T[None]

    def by_transformers(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Do the same as `run`, with transformers' functions."""
        bound = _bind(self.many, args, kwargs)
        x, states = bound.pop("hidden_states"), self.states
        weight, bias, activation = bound["weight"], bound.get("bias"), bound.get("activation")
        assert states is not None
        out = torch.empty_like(x) if batch.runs else None
        if batch.singles is not None:
            own = states[batch.singles.reads].transpose(1, 2)
            rows = x[0].T if batch.is_decode else x[0].T[batch.singles.rows]
            new = self.one(rows[..., None], own, weight, bias, activation)[..., 0]
            states[batch.singles.writes] = own.transpose(1, 2)
            if out is None:
                return new.T[None]
            out[0].T[batch.singles.rows] = new
        assert out is not None
        num_taps = states.shape[1]
        for run in batch.runs:
            whole = torch.cat((states[run.read].T[None], x[:, :, run.start : run.end]), -1)
            out[:, :, run.start : run.end] = self.many(whole, **bound)[:, :, num_taps:]
            self.put(run, whole[0, :, -num_taps:].T)
        return out


class DeltaRule(MixerCall):
    """chunk_gated_delta_rule(q, k [1, T, H, K], v [1, T, G, V], g, beta): a state is [G, K, V] in fp32.

    Yang et al., Gated Delta Networks, 2024; with a decay per channel of a key: Kimi Linear, 2025.
    """

    def state_of(self, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a state."""
        bound = _bind(self.many, args, kwargs)
        key, value = bound["key"], bound["value"]
        return (value.shape[2], key.shape[3], value.shape[3]), torch.float32

    def run(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, None]:
        """Return the outputs [1, T, G, V], and None for the state."""
        bound = _bind(self.many, args, kwargs)
        if not ops.is_native(bound["query"]):
            return self.by_transformers(batch, args, kwargs)
        q, k, v, g, beta = (bound[name][0] for name in DELTA_INPUTS)
        normalize = bound.get("use_qk_l2norm_in_kernel", False)
        assert self.states is not None
        return ops.delta_rule(q, k, v, g, beta, self.states, batch.all_runs, normalize=normalize)[None], None

    def by_transformers(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, None]:
        """Do the same as `run`, with transformers' functions."""
        bound = _bind(self.many, args, kwargs)
        inputs = {name: bound.pop(name) for name in DELTA_INPUTS}
        states = self.states
        assert states is not None
        for name in ("initial_state", "output_final_state", "chunk_size", "cu_seqlens"):
            bound.pop(name, None)
        out = torch.empty_like(inputs["value"]) if batch.runs else None
        if batch.singles is not None:
            at = batch.singles
            rows = {name: (x[0] if batch.is_decode else x[0, at.rows])[:, None] for name, x in inputs.items()}
            own = states[at.reads]
            new, states[at.writes] = self.one(**rows, initial_state=own, output_final_state=True, **bound)
            if out is None:
                return new.transpose(0, 1), None
            out[0, at.rows] = new[:, 0]
        assert out is not None
        for run in batch.runs:
            part = {name: x[:, run.start : run.end] for name, x in inputs.items()}
            own = states[run.read][None]
            done, state = self.many(**part, initial_state=own, output_final_state=True, **bound)
            out[:, run.start : run.end] = done
            self.put(run, state[0])
        return out, None


class ChunkScan(MixerCall):
    """mamba2_chunk_scan(x [1, T, H, P], dt [1, T, H], A [H], B, C [1, T, G, N], …): a state is [H, N, P] in fp32.

    Dao and Gu, Transformers are SSMs, 2024. Transformers limits dt in prompts only. If there are limits, recomputed
    output tokens are run one at a time, as they were the first time.
    """

    def __init__(self, many: Callable[..., Any], one: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
        """Derive from the call whether dt is limited. The arguments are those of `MixerCall`."""
        super().__init__(many, one, args, kwargs)
        self._limited = tuple(_bind(many, args, kwargs).get("dt_limit", UNLIMITED)) != UNLIMITED

    @property
    def tells_prompts_apart(self) -> bool:
        """Whether prompt tokens are computed differently from the same tokens in an output."""
        return self._limited

    def state_of(self, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a state."""
        bound = _bind(self.many, args, kwargs)
        heads, width = bound["hidden_states"].shape[2:]
        return (heads, bound["B"].shape[-1], width), torch.float32

    def run(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the outputs [1, T, H, P]."""
        bound = _bind(self.many, args, kwargs)
        if not ops.is_native(bound["hidden_states"]):
            return self.by_transformers(batch, args, kwargs)
        x, dt, key, query = (bound[name][0] for name in SCAN_INPUTS)
        bias, skip = bound.get("dt_bias"), bound.get("D")
        dt = dt if bias is None else dt + bias.to(dt.dtype)
        dt = F.softplus(dt) if bound.get("dt_softplus") else dt.clone()
        for run in batch.runs if self._limited else ():
            dt[run.start : run.start + run.num_prompt].clamp_(*bound["dt_limit"])
        x, dt, query = x.float(), dt.float(), query.float() * query.shape[-1] ** 0.5  # cancels the operation's division
        assert self.states is not None
        decay = bound["A"].float() * dt
        out = ops.delta_rule(query, key.float(), x, decay, dt, self.states, batch.all_runs, additive=True)
        return (out if skip is None else out + skip[:, None] * x)[None]

    def by_transformers(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Do the same as `run`, with transformers' functions."""
        bound = _bind(self.many, args, kwargs)
        inputs = {name: bound.pop(name) for name in SCAN_INPUTS}
        states = self.states
        assert states is not None
        for name in ("initial_states", "return_final_states"):
            bound.pop(name, None)
        out = torch.empty_like(inputs["hidden_states"], dtype=torch.float32)
        if batch.singles is not None:
            at = batch.singles
            own = states[at.reads].mT.contiguous()
            out[0, at.rows] = self._one(own, {name: x[0, at.rows] for name, x in inputs.items()}, bound)
            states[at.writes] = own.mT
        for run in batch.runs:
            end = run.start + run.num_prompt if self._limited else run.end
            own = states[run.read].mT[None].clone(memory_format=torch.contiguous_format)  # modified in place
            if end > run.start:
                part = {name: x[:, run.start : end] for name, x in inputs.items()}
                out[:, run.start : end], own = self.many(**part, initial_states=own, return_final_states=True, **bound)
            for row in range(end, run.end):
                out[:, row] = self._one(own, {name: x[:, row] for name, x in inputs.items()}, bound)
            self.put(run, own[0].mT)
        return out

    def _one(self, states: Tensor, rows: dict[str, Tensor], bound: dict[str, Any]) -> Tensor:
        """Return the outputs [n, H, P] of one token each of n sequences; update their states [n, H, P, N] in place."""
        width, num_states = states.shape[2:]
        bias, skip = bound.get("dt_bias"), bound.get("D")
        return self.one(
            states,
            rows["hidden_states"],
            rows["dt"][..., None].expand(-1, -1, width),
            bound["A"][:, None, None].expand(-1, width, num_states),
            rows["B"],
            rows["C"],
            None if skip is None else skip[:, None].expand(-1, width),
            dt_bias=None if bias is None else bias[:, None].expand(-1, width),
            dt_softplus=bound.get("dt_softplus", False),
        ).float()


class SelectiveScan(MixerCall):
    """mamba_selective_scan(x, dt [1, C, T], A [C, N], B, C [1, N, T], …): a state is [C, N] in fp32.

    Gu and Dao, Mamba, 2023. Transformers' function for several tokens accepts no initial state and loops over tokens in
    Python, so that one long prompt would delay all sequences. Runs use `ops.selective_scan` instead.
    """

    def state_of(self, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a state."""
        return tuple(_bind(self.many, args, kwargs)["A"].shape), torch.float32

    def run(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the outputs [1, C, T]."""
        bound = _bind(self.many, args, kwargs)
        inputs = {name: bound[name] for name in ("hidden_states", "dt", "B", "C", "z") if bound.get(name) is not None}
        states = self.states
        assert states is not None
        out = torch.empty_like(inputs["hidden_states"])
        if batch.singles is not None:
            rows, own = batch.singles.rows, states[batch.singles.reads]
            out[0].T[rows] = self._step(own, {name: x[0].T[rows] for name, x in inputs.items()}, bound)
            states[batch.singles.writes] = own
        for run in batch.runs:
            own = states[run.read].clone()
            part = {name: x[0, :, run.start : run.end].T for name, x in inputs.items()}
            out[0, :, run.start : run.end] = ops.selective_scan(
                part["hidden_states"], part["dt"], bound["A"], part["B"], part["C"], own, skip=bound.get("D"),
                gate=part.get("z"), dt_bias=bound.get("delta_bias"), softplus=bound.get("delta_softplus", False),
            ).T  # fmt: skip
            self.put(run, own)
        return out

    def _step(self, states: Tensor, rows: dict[str, Tensor], bound: dict[str, Any]) -> Tensor:
        """Return the outputs of one token each of n sequences, and update their states [n, C, N] in place.

        rows: [n, C] and [n, N].
        """
        return self.one(
            states, rows["hidden_states"], rows["dt"], bound["A"], rows["B"], rows["C"], bound.get("D"),
            z=rows.get("z"), dt_bias=bound.get("delta_bias"), dt_softplus=bound.get("delta_softplus", False),
        )  # fmt: skip


FUNCTIONS: dict[str, tuple[type[MixerCall], str]] = {
    "causal_conv1d_fn": (Convolution, "causal_conv1d_update"),
    "torch_chunk_gated_delta_rule": (DeltaRule, "torch_recurrent_gated_delta_rule"),
    "chunk_kimi_delta_attention": (DeltaRule, "recurrent_kimi_delta_attention"),
    "mamba2_chunk_scan": (ChunkScan, "mamba2_selective_state_update"),
    "mamba_selective_scan": (SelectiveScan, "mamba_selective_state_update"),
}
"""Transformers' function for several tokens -> its replacement, and the name of the function for one token."""


def _bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by parameter name."""
    return dict(zip(_names(function), args, strict=False)) | kwargs


@functools.cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = inspect.unwrap(function).__code__
    return code.co_varnames[: code.co_argcount]


# ---------------------------------------------------------------- which object runs the functions


class MixerRecorder:
    """Collects the mixer calls of a trial run, in order."""

    def __init__(self, on_call: Callable[[], object]) -> None:
        self.calls: list[MixerCall] = []
        self._on_call = on_call

    def call(self, name: str, many: Callable[..., Any], one: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call, and compute it with transformers' function."""
        self._on_call()
        self.calls.append(FUNCTIONS[name][0](many, one, args, kwargs))
        return many(*args, **kwargs)


@dataclass(slots=True)
class MixerStates:
    """The mixer calls of one forward pass, in order."""

    calls: list[MixerCall] = field(default_factory=list[MixerCall])
    batch: StateBatch | None = None  # batch of the current step
    _next: int = 0

    @property
    def tells_prompts_apart(self) -> bool:
        """Whether the states after an output differ from those after a prompt with the same tokens."""
        return any(call.tells_prompts_apart for call in self.calls)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a sequence's states in all calls."""
        return sum(call.state_bytes for call in self.calls)

    def allocate(self, num_slots: int, device: torch.device) -> None:
        """Allocate the states of `num_slots` slots."""
        for call in self.calls:
            call.allocate(num_slots, device)

    def save(self) -> None:
        """Copy the states that must be saved after the step."""
        if self.batch is not None and self.batch.copies is not None:
            for call in self.calls:
                call.copy(*self.batch.copies)

    def runs_of(self, first: int, number: int) -> Tensor:
        """Return the step's runs, in the form of `ops.delta_rule`, for a block that computes `number` calls itself.

        first: index of the first of these calls; the call after them becomes the next.
        """
        if self.batch is None:
            raise RuntimeError("a mixer was called before the step's runs were known")
        self._next = first + number
        return self.batch.all_runs

    def begin_one(self, num_tokens: int, device: torch.device) -> None:
        """Set up a step of `num_tokens` of one sequence that starts from the last slot's states, always zero."""
        if self.calls:
            states = self.calls[0].states
            assert states is not None
            run = Run(0, num_tokens, len(states) - 1, 0, num_tokens)
            self.batch = StateBatch.of([], [run], [], device)

    def call(self, name: str, many: Callable[..., Any], one: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute the next call of the forward pass."""
        if self.batch is None:
            raise RuntimeError("a mixer was called before the step's runs were known")
        call = self.calls[self._next % len(self.calls)]
        self._next += 1
        return call.run(self.batch, args, kwargs)


_active = threading.local()
_switches: set[Callable[..., Any]] = set()  # replacements that `install_functions` put into transformers' modules


@contextmanager
def running(mixers: MixerStates | MixerRecorder) -> Iterator[None]:
    """Make `mixers` handle the mixer calls of this thread inside the block."""
    before = getattr(_active, "mixers", None)
    _active.mixers = mixers
    if isinstance(mixers, MixerStates):
        mixers._next = 0
    try:
        yield
    finally:
        _active.mixers = before


def install_functions(model: nn.Module) -> None:
    """Replace the mixer functions in the modules that define a model's parts. Idempotent."""
    for source in {type(part).__module__ for part in model.modules()}:
        space = vars(sys.modules[source])
        for name, (_, one) in FUNCTIONS.items():
            many = space.get(name)
            if many is not None and many not in _switches and one in space:
                space[name] = _switch(name, many, space[one])


def switch(name: str, kind: type[MixerCall], many: Callable[..., Any], one: Callable[..., Any]) -> Callable[..., Any]:
    """Return the replacement of `many` for a mixer of ours; `kind` computes it in a step."""
    FUNCTIONS[name] = (kind, "")
    return _switch(name, many, one)


def _switch(name: str, many: Callable[..., Any], one: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(many)
    def call(*args: Any, **kwargs: Any) -> Any:
        mixers = getattr(_active, "mixers", None)
        return many(*args, **kwargs) if mixers is None else mixers.call(name, many, one, args, kwargs)

    _switches.add(call)
    return call
