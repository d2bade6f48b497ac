"""What a kind of adapter is to the reader: its config fields, its tensors, and its form on one layer.

Most kinds add B @ A to a layer's weight, as LoRA does (`Rows`). Their tensors are A and B in another form, from which A
and B follow exactly: no singular values are computed, and nothing is left out. Others scale or rotate a layer's inputs
or outputs, or add numbers at a few places of its weight (`Operation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peft_adapters.config_fields import is_alpha

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_KIND_ROWS = 4_096
"""Rank rows on one layer, as many as a worker's pool holds of one adapter."""

MAX_KIND_NUMBERS = 1 << 28
"""Numbers of what is made on all layers: 1 GB in fp32. A file of some kB may stand for more."""

MAX_KIND_PRODUCTS = 1 << 39
"""Multiplications for what is made on all layers: ten to thirty seconds of one core.

Those with the base's weights are not counted: there are at most `MAX_KIND_NUMBERS` times a layer's width of them.
"""

MAX_WHOLE = 1 << 20
"""The largest whole number in a field: more than any layer has inputs."""

BASE_WEIGHT = "weight of the base model"
"""Under this name a kind gets the layer's own weight, fp32 [out, in]."""

Numbers = Callable[[str], "NDArray[Any]"]
"""Returns a tensor by its name in the kind: fp32, or whole numbers where the file has them."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the config that changes what is computed."""

    default: Any
    valid: Callable[[Any], bool]
    wants: str  # what it must be, for a reason


def whole(default: int, least: int = 1) -> Field:
    """Return a field that is a whole number, `least` or more."""

    def valid(value: Any) -> bool:
        return type(value) is int and least <= value <= MAX_WHOLE

    return Field(default, valid, f"a whole number from {least} to {MAX_WHOLE}")


def number(default: float) -> Field:
    """Return a field that is a finite number."""
    return Field(default, is_alpha, "a finite number")


def choice(default: Any, *others: Any) -> Field:
    """Return a field with a few values, which are served."""
    values = (default, *others)

    def valid(value: Any) -> bool:
        return any(value == item and type(value) is type(item) for item in values)

    return Field(default, valid, " or ".join(map(repr, values)))


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that a kind is read for."""

    name: str
    options: Mapping[str, Any]  # the kind's fields by name; `r` and `alpha` are those of this layer
    in_features: int
    out_features: int
    widest: tuple[int, int]  # the most inputs and the most outputs of any layer that the adapter changes
    has_bias: bool = False
    place: tuple[int, int] = (0, 1)  # its number among the layers that the adapter changes, and how many these are


@dataclass(frozen=True, slots=True)
class Rows:
    """What a kind adds to one layer: scale * B @ A."""

    shapes: Mapping[str, Shape]  # of the tensors that it takes, by their names in the kind
    rank: int
    make: Callable[[Numbers], tuple[NDArray[Any], NDArray[Any]]]  # returns A [rank, in] and B [out, rank], fp32
    scale: float = 1.0
    zero_if: tuple[str, ...] = ()  # B @ A is zero if one of these tensors is
    integers: frozenset[str] = frozenset()  # tensors of whole numbers
    needs_weight: bool = False  # whether `make` asks for BASE_WEIGHT
    num_added: int = 0  # numbers that `make` reads or adds up on the way, where these may be more than A and B have
    num_products: int = 0  # multiplications that `make` does to decompose matrices or to solve for them


@dataclass(frozen=True, slots=True)
class Transform:
    """A linear change of vectors [D] that costs less than a matrix: of their numbers, pairs or blocks."""

    scale: NDArray[Any] | None = None  # [D], multiplies the numbers
    across: NDArray[Any] | None = None  # [D], multiplies a number's partner, which is added then
    group: int = 0  # numbers of a group, in which the first half's partners are the second half, with the sign changed
    blocks: NDArray[Any] | None = None  # [D / size, size, size], by which blocks of the vector are multiplied


@dataclass(frozen=True, slots=True)
class Change:
    """What an operation does to one layer, in fp32."""

    inputs: Transform | None = None
    outputs: Transform | None = None  # of the output with the layer's bias
    bias: NDArray[Any] | None = None  # [out], added to the output
    places: NDArray[Any] | None = None  # int64 [2, n], ascending: output and input of the numbers added to the weight
    numbers: NDArray[Any] | None = None  # [n]


@dataclass(frozen=True, slots=True)
class Operation:
    """A form that is not rank rows."""

    shapes: Mapping[str, Shape]  # as of `Rows`
    make: Callable[[Numbers], Change]
    num_numbers: int  # that a change has
    num_products: int = 0  # as of `Rows`
    integers: frozenset[str] = frozenset()
    zero_if: tuple[str, ...] = ()  # it changes nothing if one of these tensors is zero
    has_scale: bool = False  # whether PEFT can scale it, as `lora_scale` does


class Unfit(ValueError):
    """A layer or a config that the kind has no form for. Its text is a reason."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter."""

    name: str  # PEFT's `peft_type`
    fields: Mapping[str, Field]
    no_effect: frozenset[str]  # fields that only training reads, or that the tensors say again
    tensors: tuple[str, ...]  # ends of the names of a layer's tensors
    form: Callable[[Layer], Rows | Operation]  # raises Unfit
    shared: tuple[str, ...] = ()  # tensors that all layers share
    numbered: str = ""  # name of more of these, each with its number behind a dot
    conv1d: bool = False  # whether PEFT has it on `Conv1D`
    changes: Literal["layers", "norms", "tokens"] = "layers"
    patterns: frozenset[str] = field(default_factory=frozenset[str])  # which of `rank_pattern` and `alpha_pattern`
