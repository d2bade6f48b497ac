"""An EAGLE-3 head: one decoder layer that continues from the base's hidden states (Li et al. 2025, arXiv 2503.01840).

For each token it reads the embedding, and the hidden states of three of the base's layers for the previous token. It
loads the published format (https://github.com/SafeAILab/EAGLE, class LlamaForCausalLMEagle3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpu_worker.drafting.head import BaseHead, attention_call, check_device, embedding
from gpu_worker.layers.attention import PagedLayer, StepContext
from gpu_worker.layers.blocks import Angles, GatedMlp, LayerStack, Norm, RotaryAttention, stacks_of
from gpu_worker.layers.lora import SharedInput
from gpu_worker.loading.checkpoint import head_dim_of, one_line
from gpu_worker.loading.weights import weight_files
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from protocol.wire.errors import BadRequest

EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
"""Names of the architecture in a head's config.json."""

FEWEST_LAYERS = 7
"""Minimum layers of a base, so that the three layers a head reads are distinct."""

UNSERVED: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "tie_word_embeddings": False,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "parallel_drafting": False,
    "ptd_token_id": None,
    "quantization_config": None,
}
"""Config entries, with the only supported value of each."""

ROPES = ("default", "linear", "llama3", "yarn")
"""Types of rotary embeddings that do not depend on the text's length."""

NAMED_LAYERS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True, slots=True)
class HeadLayers:
    """The modules of a head."""

    embed: Callable[[Tensor], Tensor]  # from ids [T] to [T, D], without changes by adapters
    first: Norm
    hidden: Norm
    attention: RotaryAttention
    second: Norm
    mlp: GatedMlp
    norm: Norm
    lm_head: SharedInput
    fc: SharedInput
    angles: Angles


class EagleHead(BaseHead):
    """An EAGLE-3 head."""

    def __init__(self, base: BaseModel, stack: LayerStack, layers: HeadLayers, d2t: Tensor, max_positions: int) -> None:
        """stack: the base's layers. d2t: int64 [draft vocabulary], added to its ids to get the base's ids."""
        super().__init__(base, layers.attention.layer, len(layers.norm.weight), max_positions)
        self._stack = stack
        self._layers = layers
        self._ids = (torch.arange(len(d2t)) + d2t).tolist()

    @contextmanager
    def taking(self) -> Iterator[list[Tensor]]:
        """Collect the inputs of the three tapped layers."""
        self._stack.is_tapped = True
        try:
            yield self._stack.taken
        finally:
            self._stack.is_tapped = False

    def project(self, states: list[Tensor]) -> Tensor:
        """Return the hidden states [T, D] of tokens. states: the three layers' inputs, [T, base's width] each."""
        return self._layers.fc.project(torch.cat(states, -1))[0]

    def run(self, ids: Tensor, positions: Tensor, hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `BaseHead`."""
        batch, own = self.context.attention, self._layers
        assert batch is not None
        x = torch.cat((own.first.forward(own.embed(ids)), own.hidden.forward(hidden)), -1)
        cos, sin = own.angles.of(positions, batch.max_kv_len, hidden)
        attended = own.attention.run(x, cos, sin)
        if rows is not None:
            attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
        hidden += own.mlp.run(own.second.add_forward(attended, hidden))
        return hidden, own.lm_head.project(own.norm.forward(hidden))[0]

    def base_ids(self, ids: list[int]) -> list[int]:
        """Return the base's ids for ids of the draft vocabulary."""
        return [self._ids[id_] for id_ in ids]


def load_head(folder: Path, config: Any, base: BaseModel, impl: ops.Impl | None) -> EagleHead:
    """Load a head for a base. Raises BadRequest naming what is not supported or does not fit the base."""
    stack = _check_base(base)
    layers = len(stack.layers)
    taps = (2, layers // 2, layers - 3)
    check_config(config, base, taps)
    tensors = _read(folder, config, base)
    d2t, t2d = (tensors.pop(name, None) for name in ("d2t", "t2d"))
    num = len(tensors["lm_head.weight"])
    d2t = torch.zeros(num, dtype=torch.int64) if d2t is None else d2t.long()
    ids = torch.arange(num) + d2t
    if ids.min() < 0 or ids.max() >= base.vocab_size:
        raise BadRequest(f"its d2t names tokens outside the base's 0 … {base.vocab_size - 1}")
    if t2d is not None and not torch.equal(t2d.bool().nonzero().flatten(), ids.sort().values):
        raise BadRequest("its d2t and t2d name different tokens")
    stack.tap(taps)
    tensors = {name: tensor.to(base.device, base.dtype) for name, tensor in tensors.items()}
    own = _layers(tensors, config, base, impl)
    return EagleHead(base, stack, own, d2t, getattr(config, "max_position_embeddings", 0) or 0)


def _check_base(base: BaseModel) -> LayerStack:
    """Return the layer stack of a base whose hidden states a head can read. Raises BadRequest if there is none."""
    check_device(base)
    stacks, layers = stacks_of(base.module), base.config.num_hidden_layers
    if len(stacks) != 1 or len(stacks[0].layers) != layers:
        raise BadRequest(
            f"it is an EAGLE-3 head, which is served for bases whose layers all are attention and a feed-forward part, "
            f"each behind its norm; those of {base.config.model_type} are not, or compile is on"
        )
    if layers < FEWEST_LAYERS:
        raise BadRequest(f"it is an EAGLE-3 head, which reads three layers of {FEWEST_LAYERS}; the base has {layers}")
    return stacks[0]


def check_config(config: Any, base: BaseModel, taps: tuple[int, int, int]) -> None:
    """Raise BadRequest for an unsupported head or one for another base. taps: the layers that it may read."""
    for name, value in UNSERVED.items():
        given = getattr(config, name, value)
        if given != value and (given or value):
            raise BadRequest(f"{name} is {given} in its config; served is {value}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise BadRequest(f"its rotary embeddings are of the type {rope}; served are {', '.join(ROPES)}")
    if config.vocab_size != base.vocab_size:
        raise BadRequest(f"it is for a vocabulary of {config.vocab_size} tokens, the base has {base.vocab_size}")
    inner = getattr(config, "eagle_config", None) or {}
    if not inner.get("use_aux_hidden_state", True):
        raise BadRequest("it reads the base's last hidden states alone (use_aux_hidden_state is false)")
    # Servers number a hidden state by the layer that reads it, or by the previous layer, whose output it is.
    named = getattr(config, NAMED_LAYERS, None) or inner.get(NAMED_LAYERS)
    if named and sorted(named) not in ([*taps], [tap - 1 for tap in taps]):
        raise BadRequest(
            f"it reads the layers {named} of its base; served are those before {', '.join(map(str, taps))}"
        )


def _read(folder: Path, config: Any, base: BaseModel) -> dict[str, Tensor]:
    """Return a head's tensors by their published names. Raises BadRequest if any are missing or of wrong shape."""
    tensors: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            tensors |= load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadRequest(f"its safetensors cannot be read: {one_line(error)}") from error
    tensors = {name.removeprefix("model.").replace("layers.0.", "midlayer."): own for name, own in tensors.items()}
    width, inner, head_dim = config.hidden_size, config.intermediate_size, head_dim_of(config)
    num, num_kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    drafted = getattr(config, "draft_vocab_size", None) or config.vocab_size
    wanted: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, 3 * base.width),
        "midlayer.self_attn.q_proj.weight": (num, 2 * width),
        "midlayer.self_attn.k_proj.weight": (num_kv, 2 * width),
        "midlayer.self_attn.v_proj.weight": (num_kv, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, num),
        "midlayer.mlp.gate_proj.weight": (inner, width),
        "midlayer.mlp.up_proj.weight": (inner, width),
        "midlayer.mlp.down_proj.weight": (width, inner),
        "lm_head.weight": (drafted, width),
    }
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    wanted |= {f"{name}.weight": (width,) for name in norms}
    optional: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, width),
        "d2t": (drafted,),
        "t2d": (config.vocab_size,),
    }
    if drafted != config.vocab_size:
        wanted["d2t"] = optional.pop("d2t")
    if width != base.width:
        wanted["embed_tokens.weight"] = optional.pop("embed_tokens.weight")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise BadRequest(f"its weights lack {', '.join(missing)}")
    known = wanted | optional
    if unknown := sorted(tensors.keys() - known.keys()):
        raise BadRequest(f"its weights have {', '.join(unknown[:4])}, which no head has that is served")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != known[name]:
            raise BadRequest(f"its {name} has the shape {[*tensor.shape]}, with this base it has {[*known[name]]}")
    return tensors


def _layers(tensors: dict[str, Tensor], config: Any, base: BaseModel, impl: ops.Impl | None) -> HeadLayers:
    context = StepContext()

    def norm(name: str) -> Norm:
        return Norm(tensors[f"{name}.weight"], config.rms_norm_eps, plus_one=False, impl=impl)

    def linears(*names: str) -> SharedInput:
        return SharedInput([_linear(tensors[f"{name}.weight"]) for name in names], context, is_head=False, impl=impl)

    call = attention_call(nn.Identity(), config)
    qkv = linears(*(f"midlayer.self_attn.{name}_proj" for name in "qkv"))
    attention = RotaryAttention(PagedLayer(call, context, impl), qkv, linears("midlayer.self_attn.o_proj"), ())
    mlp = GatedMlp(
        linears("midlayer.mlp.gate_proj", "midlayer.mlp.up_proj"), linears("midlayer.mlp.down_proj"), "silu", impl
    )
    return HeadLayers(
        embedding(base, tensors.get("embed_tokens.weight")),
        norm("midlayer.input_layernorm"),
        norm("midlayer.hidden_norm"),
        attention,
        norm("midlayer.post_attention_layernorm"),
        mlp,
        norm("norm"),
        linears("lm_head"),
        linears("fc"),
        Angles(LlamaRotaryEmbedding(config), getattr(config, "max_position_embeddings", 0) or 0),
    )


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer with weight [N, K], sharing its memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
