"""The definition of an adapter kind for the reader: config fields, tensors, and form on one layer.

Most kinds add B @ A to a layer's weight, like LoRA (`Rows`); A and B follow exactly from their tensors, without a
decomposition or approximation. Others scale or rotate a layer's inputs or outputs, or add numbers at a few places of
its weight (`Operation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peft_adapters.config_fields import is_alpha

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_KIND_ROWS = 4_096
"""Maximum rank rows on one layer: the capacity of a worker's pool for one adapter."""

MAX_KIND_NUMBERS = 1 << 28
"""Maximum numbers computed for all layers: 1 GB in fp32. A file of a few kB may expand to more."""

MAX_KIND_PRODUCTS = 1 << 39
"""Maximum multiplications for all layers: ten to thirty seconds of one core.

Products with the base's weights are not counted: at most `MAX_KIND_NUMBERS` times a layer's width.
"""

MAX_WHOLE = 1 << 20
"""Maximum integer in a field: more than any layer's number of inputs."""

BASE_WEIGHT = "weight of the base model"
"""The name under which a kind receives the layer's own weight, fp32 [out, in]."""

Numbers = Callable[[str], "NDArray[Any]"]
"""Returns a tensor by its name in the kind: fp32, or integers if stored as such."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """A config field that affects results."""

    default: Any
    valid: Callable[[Any], bool]
    wants: str  # expected value, for the reason of a refusal


def whole(default: int, least: int = 1) -> Field:
    """Return a field for an integer of at least `least`."""

    def valid(value: Any) -> bool:
        return type(value) is int and least <= value <= MAX_WHOLE

    return Field(default, valid, f"a whole number from {least} to {MAX_WHOLE}")


def number(default: float) -> Field:
    """Return a field for a finite number."""
    return Field(default, is_alpha, "a finite number")


def choice(default: Any, *others: Any) -> Field:
    """Return a field with a fixed set of supported values."""
    values = (default, *others)

    def valid(value: Any) -> bool:
        return any(value == item and type(value) is type(item) for item in values)

    return Field(default, valid, " or ".join(map(repr, values)))


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer for which a kind is read."""

    name: str
    options: Mapping[str, Any]  # the kind's fields by name; `r` and `alpha` are this layer's
    in_features: int
    out_features: int
    widest: tuple[int, int]  # maximum inputs and maximum outputs of the layers that the adapter changes
    has_bias: bool = False
    place: tuple[int, int] = (0, 1)  # its index among the layers that the adapter changes, and their number


@dataclass(frozen=True, slots=True)
class Rows:
    """A kind's change of one layer's weight: scale * B @ A."""

    shapes: Mapping[str, Shape]  # of the required tensors, by their names in the kind
    rank: int
    make: Callable[[Numbers], tuple[NDArray[Any], NDArray[Any]]]  # returns A [rank, in] and B [out, rank], fp32
    scale: float = 1.0
    zero_if: tuple[str, ...] = ()  # B @ A is zero if any of these tensors is
    integers: frozenset[str] = frozenset()  # tensors of integers
    needs_weight: bool = False  # whether `make` reads BASE_WEIGHT
    num_added: int = 0  # intermediate numbers of `make`, if possibly more than A and B have
    num_products: int = 0  # multiplications of `make` for decompositions and solves


@dataclass(frozen=True, slots=True)
class Transform:
    """A linear map of vectors [D] that is cheaper than a matrix: per number, per pair or per block."""

    scale: NDArray[Any] | None = None  # [D], multiplies each number
    across: NDArray[Any] | None = None  # [D], multiplies each number's partner, which is then added
    group: int = 0  # group size; partners are in the other half of the group, negated for the first half
    blocks: NDArray[Any] | None = None  # [D / size, size, size], multiplies blocks of the vector


@dataclass(frozen=True, slots=True)
class Change:
    """An operation's effect on one layer, in fp32."""

    inputs: Transform | None = None
    outputs: Transform | None = None  # applied to the output including bias
    bias: NDArray[Any] | None = None  # [out], added to the output
    places: NDArray[Any] | None = None  # int64 [2, n], ascending: output and input index of numbers added to the weight
    numbers: NDArray[Any] | None = None  # [n]


@dataclass(frozen=True, slots=True)
class Operation:
    """A form other than rank rows."""

    shapes: Mapping[str, Shape]  # see `Rows`
    make: Callable[[Numbers], Change]
    num_numbers: int  # numbers in a change
    num_products: int = 0  # see `Rows`
    integers: frozenset[str] = frozenset()
    zero_if: tuple[str, ...] = ()  # it changes nothing if any of these tensors is zero
    has_scale: bool = False  # whether PEFT can scale it, like `lora_scale` does


class Unfit(ValueError):
    """A layer or config for which the kind has no form. The text is a reason for refusal."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter."""

    name: str  # PEFT's `peft_type`
    fields: Mapping[str, Field]
    no_effect: frozenset[str]  # fields that only training reads, or that repeat information in the tensors
    tensors: tuple[str, ...]  # suffixes of the names of a layer's tensors
    form: Callable[[Layer], Rows | Operation]  # raises Unfit
    shared: tuple[str, ...] = ()  # tensors shared by all layers
    numbered: str = ""  # name of further shared tensors, each followed by a dot and its number
    conv1d: bool = False  # whether PEFT supports it on `Conv1D`
    changes: Literal["layers", "norms", "tokens"] = "layers"
    patterns: frozenset[str] = field(default_factory=frozenset[str])  # its ones of `rank_pattern`, `alpha_pattern`
