"""Prepares adapters' extras for the native call that runs a stack of layers.

A native call can multiply, rotate and add. A step that has rows with other extras (weights, norms, trained tokens, LoRA
outside the pool) runs layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from gpu_worker.layers.apply_extras import ExtraRows
from gpu_worker.layers.extras import Extras, LinearExtras, LinearTransform
from gpu_worker.layers.lora import SharedInput
from lora_kernels import ops

MAX_SCALED = 4
"""Maximum adapters in a step at request-chosen scales, whose changes of all layers are materialized at once (DoRA: a
number per output of each layer). With more, layers run one at a time and compute their own."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """An adapter's extras at one scale, as far as a native call of a stack can apply them."""

    changes: ops.AdapterChanges | None = None  # None: nothing to apply
    in_layers: bool = False  # whether `changes` covers all extras inside the layers
    everywhere: bool = False  # whether `changes` covers all extras


class StackChanges:
    """Prepares the extras of steps for one stack, once per adapter."""

    def __init__(self, stack: ops.DecoderStack, layers: Sequence[SharedInput], head: SharedInput | None) -> None:
        """head: the linear layer after the stack, if the stack's call includes one."""
        self._stack = stack
        self._layers = _float_biases(layers)
        self._head = _float_biases([] if head is None else [head])
        # Entries live as long as their keys: extras or, at other scales, a step's `ExtraRows`.
        self._known: WeakKeyDictionary[Extras | ExtraRows, _Ready] = WeakKeyDictionary()

    def rows(self, groups: list[ExtraRows], *, everywhere: bool) -> ops.ChangedRows | None:
        """Return the changes and the rows they apply to; None if a native call cannot apply all of them.

        everywhere: require all extras to be covered, not only those inside the layers.
        """
        if sum(group.scale != 1.0 for group in groups) > MAX_SCALED:
            return None
        found: list[tuple[ops.AdapterChanges, Tensor]] = []
        for group in groups:
            ready = self._ready(group)
            if not (ready.everywhere if everywhere else ready.in_layers):
                return None
            if ready.changes is not None:
                if len(group.active) != len(group.rows):
                    return None
                found.append((ready.changes, group.rows))
        return ops.changed_rows(found)

    def _ready(self, group: ExtraRows) -> _Ready:
        key = group.extras if group.scale == 1.0 else group
        ready = self._known.get(key)
        if ready is None:
            self._known[key] = ready = self._make(group.extras, group.scale)
        return ready

    def _make(self, extras: Extras, scale: float) -> _Ready:
        in_layers = _changes_at(extras, scale, self._layers)
        if in_layers is None or (extras.in_layers and (extras.prefix is not None or extras.norms or extras.parameters)):
            return _Ready()
        in_head = _changes_at(extras, scale, self._head)
        is_all = extras.linear.keys() <= self._layers.keys() | self._head.keys() and in_head is not None
        others = extras.embeddings or extras.norms or extras.parameters or extras.vocab_size
        found = [*in_layers, *(in_head or ())]
        changes = self._stack.prepare(found) if found else None
        if found and changes is None:
            return _Ready(in_layers=not in_layers)
        return _Ready(changes, in_layers=True, everywhere=is_all and not others)


def _float_biases(shared: Sequence[SharedInput]) -> dict[int, Tensor | None]:
    """Return the biases of linear layers in fp32, by site."""
    found: dict[int, Tensor | None] = {}
    for inputs in shared:
        for i, site in enumerate(inputs.lora_sites):
            bias = inputs.bias(i)
            found[site.index] = None if bias is None else bias.float()
    return found


def _changes_at(extras: Extras, scale: float, biases: dict[int, Tensor | None]) -> list[ops.LayerChange] | None:
    """Return the changes that extras make at some sites; None if a native call cannot apply some of them."""
    found: list[ops.LayerChange] = []
    for site, part in extras.linear.items():
        if site not in biases:
            continue
        own = _changes(site, part, scale, biases[site])
        if own is None:
            return None
        found += own
    return found


def _changes(site: int, part: LinearExtras, scale: float, bias: Tensor | None) -> list[ops.LayerChange] | None:
    """Return the changes that one layer's extras make, in the order of `apply_extras.apply_linear`."""
    if part.weight is not None or part.lora is not None or part.tokens is not None or part.places is not None:
        return None
    found: list[ops.LayerChange] = []
    if part.inputs is not None:
        found.append(_transform(site, part.inputs, of_inputs=True))
    if part.bias is not None and bias is not None:
        if len(part.bias) != len(bias):
            return None
        # The difference is rounded to the layer's dtype.
        found.append(ops.LayerChange(site, False, "add", (part.bias - bias.to(part.bias.dtype)).float()))
        bias = part.bias.float()
    if part.lora_bias is not None:
        found.append(ops.LayerChange(site, False, "add", part.lora_bias if scale == 1.0 else part.lora_bias * scale))
    if part.outputs is not None:
        found.append(_transform(site, part.outputs, of_inputs=False))
    if part.dora is not None:
        found.append(ops.LayerChange(site, False, "around", part.dora.at(scale), bias))
    return found


def _transform(site: int, transform: LinearTransform, *, of_inputs: bool) -> ops.LayerChange:
    if transform.blocks is not None:
        return ops.LayerChange(site, of_inputs, "blocks", transform.blocks)
    assert transform.scale is not None
    return ops.LayerChange(site, of_inputs, "scale", transform.scale, transform.across, transform.group)
