"""What adapters' extras change of a stack of layers, made ready for the one call that runs it.

A native call multiplies, rotates and adds numbers itself. Whatever else extras are (weights, norms, trained tokens,
LoRA outside the pool) runs layer by layer, in a step that has a row of such an adapter.
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
"""Adapters of a step at scales that requests chose, whose changes of all layers are there at once: DoRA's have a number
for each output of each layer. With more of them layers run one by one, and compute those of a layer in its turn."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """An adapter's extras at one scale, as far as a native call of a stack makes them."""

    changes: ops.AdapterChanges | None = None  # None: there are none
    in_layers: bool = False  # whether these are all that lie in the layers
    everywhere: bool = False  # whether these are all


class StackChanges:
    """Makes the extras of steps ready for one stack, those of an adapter once."""

    def __init__(self, stack: ops.DecoderStack, layers: Sequence[SharedInput], head: SharedInput | None) -> None:
        """head: the linear layer behind the stack, if the stack's call has one."""
        self._stack = stack
        self._layers = _float_biases(layers)
        self._head = _float_biases([] if head is None else [head])
        # What is made lasts as long as what it is made of: extras, and for other scales the rows of their steps.
        self._known: WeakKeyDictionary[Extras | ExtraRows, _Ready] = WeakKeyDictionary()

    def rows(self, groups: list[ExtraRows], *, everywhere: bool) -> ops.ChangedRows | None:
        """Return what adapters change of which rows; None where a native call cannot do all of it.

        everywhere: all that adapters change counts, or else what lies in the layers.
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
    """Return the biases of linear layers by site, in fp32."""
    found: dict[int, Tensor | None] = {}
    for inputs in shared:
        for i, site in enumerate(inputs.lora_sites):
            bias = inputs.bias(i)
            found[site.index] = None if bias is None else bias.float()
    return found


def _changes_at(extras: Extras, scale: float, biases: dict[int, Tensor | None]) -> list[ops.LayerChange] | None:
    """Return what extras change at some sites; None where some of it is no change that a native call makes."""
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
    """Return what one layer's extras change, in the order of `apply_extras.apply_linear`."""
    if part.weight is not None or part.lora is not None or part.tokens is not None or part.places is not None:
        return None
    found: list[ops.LayerChange] = []
    if part.inputs is not None:
        found.append(_transform(site, part.inputs, of_inputs=True))
    if part.bias is not None and bias is not None:
        if len(part.bias) != len(bias):
            return None
        # The difference is rounded as the layer's dtype has it.
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
