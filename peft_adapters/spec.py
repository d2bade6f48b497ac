"""An adapter's changes: which tensors of its file, by name, go where in the base model. See `read_adapter`."""

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
    """A part of the LoRA on one layer, if the adapter's model fuses or splits layers differently from the base."""

    a: str  # tensor [rank, in]
    b: str  # tensor [.., rank], of which rows [begin, end) are used
    begin: int
    end: int
    at: int = 0  # output of the layer to which the first of these rows belongs
    factor: float = 1.0  # factor on b and the bias
    bias: str = ""  # tensors of which the same rows are used; see `LoraWeights`
    magnitude: str = ""


@dataclass(frozen=True, slots=True)
class KindRows:
    """The rank rows of a kind other than LoRA on one layer."""

    kind: str  # PEFT's name
    rows: Rows
    tensors: Mapping[str, str]  # name in the kind -> name in the file

    def matrices(
        self, read: Callable[[str], NDArray[Any]], weight: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return A [rank, in] and B [out, rank] in fp32, without the scale.

        read: returns a tensor of the file, fp32 or integers. weight: the base's [out, in] in fp32, if
        `Rows.needs_weight`. Raises AdapterRefused for numbers that are invalid for the kind.
        """

        def get(name: str) -> NDArray[Any]:
            if name != BASE_WEIGHT:
                return read(self.tensors[name])
            assert weight is not None
            return weight

        return _made(self.kind, self.rows.make, get)


def _made(kind: str, make: Callable[[Numbers], _Made], get: Numbers) -> _Made:
    """Return the result of a kind's `make`. Raises AdapterRefused for numbers that are invalid for the kind."""
    import numpy as np  # imported here, since a store that has read no such adapter does not need it

    try:
        with np.errstate(all="ignore"):  # numbers that are not finite are refused later
            return make(get)
    except (Unfit, np.linalg.LinAlgError) as error:
        raise AdapterRefused([f"{kind}: {error}"]) from None


@dataclass(frozen=True, slots=True)
class LayerOperation:
    """An adapter's change of one linear layer other than rank rows."""

    site: str  # SiteShape.name
    kind: str  # PEFT's name
    operation: Operation
    tensors: Mapping[str, str]  # see `KindRows`

    def change(self, read: Callable[[str], NDArray[Any]]) -> Change:
        """Return the change. read: see `KindRows.matrices`. Raises AdapterRefused."""
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
    """Replaces a and b: for each expert, a [rank / n, in] and b [out / n, rank / n] of each of its n layers."""
    blocks: tuple[LoraBlock, ...] = ()
    """Replaces a and b: A is the blocks' A stacked; B has their rows as blocks and is zero elsewhere.

    If bias or magnitude is set (to one block's), all blocks have them.
    """
    width: int = 0  # out, if there are blocks or `of_kind`
    of_kind: KindRows | None = None  # replaces a and b for kinds other than LoRA

    @property
    def tensors(self) -> list[tuple[str, str]]:
        """The names of all pairs of a and b; empty for kinds other than LoRA."""
        if self.of_kind is not None:
            return []
        if self.blocks:
            return [(block.a, block.b) for block in self.blocks]
        return [pair for pairs in self.experts for pair in pairs] or [(self.a, self.b)]

    @property
    def needs_weight(self) -> bool:
        """Whether computing the change needs the base's weight."""
        return bool(self.magnitude) or (self.of_kind is not None and self.of_kind.rows.needs_weight)

    @property
    def biases(self) -> list[str]:
        """The names of all biases."""
        return [name for name in [block.bias for block in self.blocks] or [self.bias] if name]


@dataclass(frozen=True, slots=True)
class ReplacedWeights:
    """A parameter of a module, replaced by a tensor of the adapter."""

    site: str
    parameter: Literal["weight", "bias"]
    tensor: str


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Rows of an embedding or head, replaced by rows of the adapter."""

    site: str
    indices: tuple[int, ...]  # token ids
    tensor: str  # [len(indices), width]


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Tokens without an id that an adapter puts before every text, as embeddings or as keys and values."""

    kind: str  # PEFT's name
    num: int
    tensor: str  # embeddings [num, width], or a prefix [num, layers * 2 * heads * entries], keys before values
    site: str = ""  # the input embedding, which gets the embeddings as further rows; "": a prefix
    shape: tuple[int, ...] = ()  # for a prefix: layers, heads, entries of a head
    task: tuple[str, ...] = ()  # tensors [1, num, rank] and [1, rank, width] whose product multiplies the embeddings


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter's changes, in the order of the base model's sites."""

    sites: tuple[LoraWeights, ...]  # linear layers
    embeddings: tuple[LoraWeights, ...] = ()
    parameters: tuple[LoraWeights, ...] = ()
    operations: tuple[LayerOperation, ...] = ()
    idle: tuple[LoraWeights, ...] = ()  # LoRA on layers of `ServedModel.idle`, which must be zero
    replaced: tuple[ReplacedWeights, ...] = ()
    tokens: tuple[TrainedTokens, ...] = ()
    invocation: tuple[int, ...] = ()  # activated LoRA: active from the last occurrence of these tokens in the prompt
    vocab_size: int = 0  # vocabulary size of the adapter; 0: the base's
    num_labels: int = 0  # labels of its own head; 0: no head
    unscaled: str = ""  # name of a kind that PEFT cannot scale
    head: str = ""  # its own head, if the base has none: tensor [labels, width]
    virtual: VirtualTokens | None = None  # if set, the only other change is a classifier's head
    mapped: Mapping[str, str] = field(default_factory=dict[str, str])  # name patterns in the file -> in the base

    @property
    def rank(self) -> int:
        """The maximum rank on any layer, embedding or parameter."""
        return max((part.rank for part in (*self.sites, *self.embeddings, *self.parameters)), default=0)

    @property
    def modules(self) -> list[str]:
        """Last parts of the names of changed modules, such as "q_proj", sorted."""
        parts = (*self.sites, *self.embeddings, *self.parameters, *self.operations, *self.replaced, *self.tokens)
        return sorted({part.site.rpartition(".")[2] for part in parts})
