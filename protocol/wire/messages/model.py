"""Worker to all services: the base model that the fleet serves."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.wire.messages.base import Packed, Record, Task, Wire

OPAQUE = "opaque"
"""Kind of a linear layer with unreadable weights, such as a quantized one: adapters can only add to its output."""

Activation = Literal["", "softmax", "sigmoid", "none"]
"""How a text's logits become scores. "": sigmoid of a single logit, softmax of several."""


class SiteShape(Packed, frozen=True):
    """A part of the model that an adapter can change, under the model's name for it."""

    name: str  # "model.layers.0.self_attn.q_proj"; of a parameter its full name: "….mlp.experts.gate_up_proj"
    in_features: int  # embedding: number of entries; norm: width
    out_features: int
    kind: Literal["linear", "conv1d", "opaque", "embedding", "norm", "parameter"] = "linear"  # opaque: see `OPAQUE`
    has_bias: bool = False
    num_experts: int = 0  # parameter: number of expert matrices in it


class ServedModel(Wire, frozen=True):
    """A base that the fleet serves: enough to validate requests and adapters without its weights."""

    model: str  # model as given to the worker
    name: str  # served name
    fingerprint: str  # hash of config and weight layout
    model_type: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and output together that fit into a worker's KV cache
    sites: list[SiteShape]  # in the order of the model's modules
    dtype: str = ""  # dtype of weights and activations
    dtype_reason: str = ""  # why that dtype was chosen
    kernels: str = ""  # instruction set of the native CPU kernels; "": they are not used
    draft_model: str = ""  # name of the draft model; "": none
    tied_embeddings: bool = False
    created_ms: int = 0
    device: str = ""  # "cpu" or "cuda"
    task: Task = "generate"  # main task
    tasks: list[Task] = []  # further tasks, of the base model or only of adapters, see `labels`
    labels: list[str] = []  # `classify`, `score`: labels by index; [] with `score`: only adapters with a head answer
    activation: Activation = ""  # `score`: activation from a text's logits to label probabilities
    pair_activation: Activation = ""  # `score`: activation from a pair's one logit to its score
    label_head: str = ""  # `score`: site that outputs the logits; an adapter's head may have another number of them
    missing: list[str] = []  # `score`: sites without weights in the base, which adapters must bring
    width: int = 0  # `embed`: dimension of a vector
    unit_length: bool = False  # `embed`: whether vectors are normalized to length 1
    head_dim: int = 0  # size of an attention head; 0: unknown
    prefix: list[int] | None = None
    """Number of layers, heads and entries per head of the keys and values that an adapter may bring. []: none may be
    brought, since some layers keep none or keep others. None: unknown.
    """
    tokenizer: dict[str, str] = {}  # digests of the parts of its tokenizer.json, by name; {}: there is no such file
    idle: list[SiteShape] = []
    """Linear layers that PEFT adapts although the model does not run them on every token. Cross-attention to an encoder
    never runs; a selective scan reads only the weights of its dt_proj.
    """
    weights: str = ""  # hash of samples of the weights, see `gpu_worker.loading.weights`; "": unknown

    @property
    def identity(self) -> tuple[str, dict[str, str]]:
        """The part of a base that checks of adapters depend on: when it changes, adapters must be checked again."""
        return self.fingerprint, self.tokenizer

    def less(self, num_virtual: int) -> ServedModel:
        """Return this model with its context shortened by the virtual tokens of an adapter."""
        left = max(self.max_model_len - num_virtual, 0)
        return msgspec.structs.replace(self, max_model_len=left) if num_virtual else self

    def is_same(self, other: ServedModel) -> bool:
        """Return whether both are the same base: the same config and layout, and the same weights as far as known."""
        unknown = not self.weights or not other.weights
        return self.fingerprint == other.fingerprint and (unknown or self.weights == other.weights)

    def does(self, task: Task) -> bool:
        """Return whether requests may ask the model for this task."""
        return task == self.task or task in self.tasks


class AddedBase(Wire, frozen=True):
    """A base that an operator has added while the fleet ran."""

    model: str  # Hub id, or absolute path, as gateways and workers are given it
    added_ms: int


class AddedBases(Record, frozen=True):
    """The bases that operators have added and removed, as one record of the queue."""

    bases: dict[str, AddedBase] = {}  # by name
    removed: list[str] = []  # names removed since and not added again, the latest last
