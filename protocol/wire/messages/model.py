"""Worker to everyone: the base model that the fleet serves."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.wire.messages.base import Packed, Record, Task, Wire

OPAQUE = "opaque"
"""Kind of a linear layer whose weights cannot be read, such as a quantised one: adapters can only add to its output."""

Activation = Literal["", "softmax", "sigmoid", "none"]
"""What makes scores of the logits of a text. "": sigmoid of a single one, softmax of several."""


class SiteShape(Packed, frozen=True):
    """A part of the model that an adapter can change, as the model names it."""

    name: str  # "model.layers.0.self_attn.q_proj"; of a parameter with the parameter: "….mlp.experts.gate_up_proj"
    in_features: int  # embedding: number of entries; norm: width
    out_features: int
    kind: Literal["linear", "conv1d", "opaque", "embedding", "norm", "parameter"] = "linear"  # opaque: see `OPAQUE`
    has_bias: bool = False
    num_experts: int = 0  # parameter: number of matrices in it


class ServedModel(Wire, frozen=True):
    """A base that the fleet serves: enough to validate requests and adapters without the weights."""

    model: str  # model as given to the worker
    name: str  # served name
    fingerprint: str  # hash of config and weight layout
    model_type: str
    vocab_size: int
    max_model_len: int  # tokens of prompt + output that a worker's cache can hold
    sites: list[SiteShape]  # in the order of the model's modules
    dtype: str = ""  # dtype of weights and activations
    dtype_reason: str = ""  # why it is that one
    kernels: str = ""  # the native CPU kernels' instruction set; "": others compute
    draft_model: str = ""  # name of the model that drafts tokens for it; "": none
    tied_embeddings: bool = False
    created_ms: int = 0
    device: str = ""  # "cpu" or "cuda"
    task: Task = "generate"  # main task
    tasks: list[Task] = []  # further tasks, of the base model or only of adapters, see `labels`
    labels: list[str] = []  # `classify`, `score`: labels by index; [] of `score`: only adapters with a head answer
    activation: Activation = ""  # `score`: activation from a text's logits to label probabilities
    pair_activation: Activation = ""  # `score`: activation from a pair's one logit to its score
    label_head: str = ""  # `score`: site that outputs the logits; an adapter's may have another number
    missing: list[str] = []  # `score`: sites without weights in the base, so that adapters must bring them
    width: int = 0  # `embed`: entries of a vector
    unit_length: bool = False  # `embed`: whether vectors are normalised to length 1
    head_dim: int = 0  # size of an attention head; 0: unknown
    prefix: list[int] | None = None
    """Layers, heads and entries of a head of the keys and values that an adapter may bring. []: it may bring none,
    since layers keep others or none; None: unknown."""
    tokenizer: dict[str, str] = {}  # digests of the parts of its tokenizer.json, by name; {}: it has none
    idle: list[SiteShape] = []
    """Linear layers that PEFT adapts and the model does not run on every token: not at all, as those that attend to an
    encoder, or for their weights alone, as the selective scan reads its dt_proj."""
    weights: str = ""  # hash of the weights' own numbers, see `gpu_worker.loading.weights`; "": not known

    @property
    def identity(self) -> tuple[str, dict[str, str]]:
        """What adapters must be checked for again where it is another."""
        return self.fingerprint, self.tokenizer

    def less(self, num_virtual: int) -> ServedModel:
        """Return it with the part of its context that so many virtual tokens of an adapter leave."""
        left = max(self.max_model_len - num_virtual, 0)
        return msgspec.structs.replace(self, max_model_len=left) if num_virtual else self

    def is_same(self, other: ServedModel) -> bool:
        """Return whether both are one base: of one config, layout and, as far as both say, of the same weights."""
        unknown = not self.weights or not other.weights
        return self.fingerprint == other.fingerprint and (unknown or self.weights == other.weights)

    def does(self, task: Task) -> bool:
        """Return whether requests may ask this of the model."""
        return task == self.task or task in self.tasks


class AddedBase(Wire, frozen=True):
    """A base that an operator has added while the fleet ran."""

    model: str  # Hub id, or absolute path, as gateways and workers are given it
    added_ms: int


class AddedBases(Record, frozen=True):
    """The bases that operators have added and taken away, as one record of the queue."""

    bases: dict[str, AddedBase] = {}  # by name
    removed: list[str] = []  # names that were taken away since, and not added again; the last one last
