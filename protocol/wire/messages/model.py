"""Worker to everyone: the base model that the fleet serves."""

from __future__ import annotations

from typing import Literal

from protocol.wire.messages.base import Packed, Task, Wire

OPAQUE = "opaque"
"""Kind of a linear layer whose weights cannot be read, such as a quantised one: adapters can only add to its output."""

Activation = Literal["", "softmax", "sigmoid", "none"]
"""What makes scores of the logits of a text. "": sigmoid of a single one, softmax of several."""


class SiteShape(Packed, frozen=True):
    """A part of the model that an adapter can change, as the model names it."""

    name: str  # "model.layers.0.self_attn.q_proj"; of a parameter with the parameter: "….mlp.experts.gate_up_proj"
    in_features: int  # of an embedding: its entries; of a norm: its width
    out_features: int
    kind: Literal["linear", "conv1d", "opaque", "embedding", "norm", "parameter"] = "linear"  # opaque: see `OPAQUE`
    has_bias: bool = False
    num_experts: int = 0  # of a parameter: matrices in it


class ServedModel(Wire, frozen=True):
    """What the fleet serves: enough to validate requests and adapters without the weights."""

    model: str  # as given to the worker
    name: str  # served name
    fingerprint: str  # of config and weight layout; workers with another one refuse to join
    model_type: str
    vocab_size: int
    max_model_len: int  # tokens of prompt + output that a worker's cache can hold
    sites: list[SiteShape]
    dtype: str = ""  # of weights and activations
    dtype_reason: str = ""  # why it is that one
    kernels: str = ""  # the native CPU kernels' instruction set; "": others compute
    tied_embeddings: bool = False
    created_ms: int = 0
    device: str = ""  # "cpu" or "cuda"
    task: Task = "generate"  # what it is for
    tasks: list[Task] = []  # what it does besides, for the base model or for adapters alone, see `labels`
    labels: list[str] = []  # of `classify` and `score`, by index; [] of `score`: only adapters with a head can be asked
    activation: Activation = ""  # of `score`: what makes the labels' probabilities of the logits of a text
    pair_activation: Activation = ""  # of `score`: what makes the score of a pair of its one logit
    label_head: str = ""  # of `score`: the site whose outputs are the logits; an adapter's may have another number
    missing: list[str] = []  # of `score`: sites that the base has no weights of, so that adapters must bring them
    width: int = 0  # of `embed`: entries of a vector
    unit_length: bool = False  # of `embed`: whether vectors are normalised to length 1
    head_dim: int = 0  # of an attention head; 0: not known
    tokenizer: dict[str, str] = {}  # the digests of the parts of its tokenizer.json, by name; {} if it has none

    @property
    def identity(self) -> tuple[str, dict[str, str]]:
        """What adapters must be checked for again where it is another."""
        return self.fingerprint, self.tokenizer

    def does(self, task: Task) -> bool:
        """Return whether requests may ask this of the model."""
        return task == self.task or task in self.tasks
