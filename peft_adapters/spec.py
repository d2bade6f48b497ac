"""What an adapter changes: which tensors of its file, by name, go where in the base model. See `read_adapter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from peft_adapters.kinds.kind import BASE_WEIGHT, Change, Numbers, Operation, Rows, Unfit
from protocol.wire.errors import AdapterRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray


_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class LoraBlock:
    """A part of the LoRA on one layer, where the adapter's model fuses or splits layers that the base does not."""

    a: str  # tensor [rank, in]
    b: str  # tensor, of which rows [begin, end) count: [.., rank]
    begin: int
    end: int
    at: int = 0  # output of the layer to which the first of these rows belongs
    factor: float = 1.0  # factor of b and the bias
    bias: str = ""  # tensors of which the same rows count; see `LoraWeights`
    magnitude: str = ""


@dataclass(frozen=True, slots=True)
class KindRows:
    """The rank rows of another kind than LoRA on one layer."""

    kind: str  # PEFT's name
    rows: Rows
    tensors: Mapping[str, str]  # the tensors that it takes: name in the kind -> in the file

    def matrices(
        self, read: Callable[[str], NDArray[Any]], weight: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return A [rank, in] and B [out, rank], fp32, the scale apart.

        read: returns a tensor of the file, fp32 or whole numbers. weight: the base's [out, in] in fp32, where
        `Rows.needs_weight`. Raises AdapterRefused for numbers that no such adapter can have.
        """

        def get(name: str) -> NDArray[Any]:
            if name != BASE_WEIGHT:
                return read(self.tensors[name])
            assert weight is not None
            return weight

        return _made(self.kind, self.rows.make, get)


def _made(kind: str, make: Callable[[Numbers], _Made], get: Numbers) -> _Made:
    """Return what a kind makes of its tensors. Raises AdapterRefused for numbers that no such adapter can have."""
    import numpy as np  # here, since a store that has read no such adapter needs none of it

    try:
        with np.errstate(all="ignore"):  # numbers that are not finite are refused later
            return make(get)
    except (Unfit, np.linalg.LinAlgError) as error:
        raise AdapterRefused([f"{kind}: {error}"]) from None


@dataclass(frozen=True, slots=True)
class LayerOperation:
    """What an adapter does to one linear layer that is not rank rows."""

    site: str  # SiteShape.name
    kind: str  # PEFT's name
    operation: Operation
    tensors: Mapping[str, str]  # as of `KindRows`

    def change(self, read: Callable[[str], NDArray[Any]]) -> Change:
        """Return the change. read: as of `KindRows.matrices`. Raises AdapterRefused."""
        return _made(self.kind, self.operation.make, lambda name: read(self.tensors[name]))


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """LoRA on one layer, embedding or parameter.

    Shapes: on a layer a [rank, in], b [out, rank]; on an embedding a [rank, entries], b [width, rank]; on a parameter
    of several experts a [experts * rank, in], b [out, rank * experts].
    """

    site: str  # SiteShape.name
    rank: int
    scale: float
    a: str
    b: str
    bias: str = ""  # added to b's product: [out]
    magnitude: str = ""  # DoRA's: [out], on an embedding [width]
    singular: str = ""  # AdaLoRA's values, which multiply the rows of a: [rank, 1]
    experts: tuple[tuple[tuple[str, str], ...], ...] = ()
    """In the place of a and b, for each expert: a [rank / n, in] and b [out / n, rank / n] of each of its n layers."""
    blocks: tuple[LoraBlock, ...] = ()
    """In the place of a and b: A is the blocks' A stacked, B has their rows as blocks and is zero elsewhere.

    Then bias and magnitude are one block's, and say that all blocks have them.
    """
    width: int = 0  # out, where there are blocks or `of_kind`
    of_kind: KindRows | None = None  # in the place of a and b, of an adapter that is not LoRA

    @property
    def tensors(self) -> list[tuple[str, str]]:
        """The names of all pairs of a and b; none of another kind than LoRA."""
        if self.of_kind is not None:
            return []
        if self.blocks:
            return [(block.a, block.b) for block in self.blocks]
        return [pair for pairs in self.experts for pair in pairs] or [(self.a, self.b)]

    @property
    def needs_weight(self) -> bool:
        """Whether the base's weight is needed to say what it adds."""
        return bool(self.magnitude) or (self.of_kind is not None and self.of_kind.rows.needs_weight)

    @property
    def biases(self) -> list[str]:
        """The names of all biases."""
        return [name for name in [block.bias for block in self.blocks] or [self.bias] if name]


@dataclass(frozen=True, slots=True)
class ReplacedWeights:
    """A parameter of a module whose place a tensor of the adapter takes."""

    site: str
    parameter: Literal["weight", "bias"]
    tensor: str


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Rows of an embedding or head whose place rows of the adapter take."""

    site: str
    indices: tuple[int, ...]  # token ids
    tensor: str  # [len(indices), width]


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Tokens without an id that an adapter puts before every text: their embeddings, or their keys and values."""

    kind: str  # PEFT's name
    num: int
    tensor: str  # embeddings [num, width], or a prefix [num, layers * 2 * heads * entries], keys before values
    site: str = ""  # the input embedding, to whose rows embeddings are added; "": a prefix
    shape: tuple[int, ...] = ()  # of a prefix: layers, heads, entries of a head
    task: tuple[str, ...] = ()  # tensors [1, num, rank] and [1, rank, width] by whose product embeddings are multiplied


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an adapter changes, in the order of the base model's sites."""

    sites: tuple[LoraWeights, ...]  # linear layers
    embeddings: tuple[LoraWeights, ...] = ()
    parameters: tuple[LoraWeights, ...] = ()
    operations: tuple[LayerOperation, ...] = ()
    idle: tuple[LoraWeights, ...] = ()  # LoRA on layers of `ServedModel.idle`: it must be zero
    replaced: tuple[ReplacedWeights, ...] = ()
    tokens: tuple[TrainedTokens, ...] = ()
    invocation: tuple[int, ...] = ()  # activated LoRA: active from these tokens' last occurrence in the prompt on
    vocab_size: int = 0  # tokens the adapter knows; 0: those of the base
    num_labels: int = 0  # labels of its own head; 0: no head
    unscaled: str = ""  # the kind, of an adapter that PEFT cannot scale
    head: str = ""  # its own head, where the base has none: tensor [labels, width]
    virtual: VirtualTokens | None = None  # then it changes nothing else, but for the head of a classifier
    mapped: Mapping[str, str] = field(default_factory=dict[str, str])  # names of the file -> of the base, as patterns

    @property
    def rank(self) -> int:
        """The largest rank on any layer, embedding or parameter."""
        return max((part.rank for part in (*self.sites, *self.embeddings, *self.parameters)), default=0)

    @property
    def modules(self) -> list[str]:
        """Last names of the modules that the adapter changes, such as "q_proj", sorted."""
        parts = (*self.sites, *self.embeddings, *self.parameters, *self.operations, *self.replaced, *self.tokens)
        return sorted({part.site.rpartition(".")[2] for part in parts})
