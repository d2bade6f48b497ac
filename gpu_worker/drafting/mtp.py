"""The multi-token prediction head (MTP) in a base's own checkpoint, as in Qwen3.5: tensors under `mtp.`.

It concatenates each token's embedding and the base's last hidden state of the previous token, then applies a linear
layer and one decoder layer with full attention. The output of its norm goes through the base's head, and is also the
hidden state read with a draft token (vLLM, vllm/model_executor/models/qwen3_5_mtp.py).
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gpu_worker.drafting.head import BaseHead, attention_call, check_device, embedding
from gpu_worker.layers.attention import ATTENTION, PagedLayer, StepContext, bind
from gpu_worker.layers.lora import SharedInput
from gpu_worker.loading.weights import weight_files
from gpu_worker.model.model import BaseModel
from gpu_worker.tasks.model_tasks import decoder_of
from lora_kernels import ops
from protocol.wire.errors import BadRequest

PREFIX = "mtp."
"""Prefix of the names of its tensors."""

TYPES = ("qwen3_5_text",)
"""Model types whose MTP heads are known to have this form."""


class MtpHead(BaseHead):
    """An MTP head of Qwen3.5's kind."""

    def __init__(self, base: BaseModel, module: nn.ModuleDict, layer: PagedLayer, head: SharedInput) -> None:
        """head: the base's language model head. module: the MTP head's parts by name. layer: its attention."""
        super().__init__(base, layer, base.width, base.max_positions)
        self._base = base
        self._embed = embedding(base)
        self._module = module
        self._head = head
        self._angles: Any = getattr(decoder_of(base.module), "rotary_emb")  # noqa: B009  a module's attribute

    def taking(self) -> AbstractContextManager[list[Tensor]]:
        """Collect the base's last hidden states."""
        return self._base.hidden_states(is_wanted=True)

    def project(self, states: list[Tensor]) -> Tensor:
        """Return the hidden states unchanged."""
        return states[-1][0]

    def run(self, ids: Tensor, positions: Tensor, hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `BaseHead`."""
        own: Any = self._module
        x = torch.cat((own.pre_fc_norm_embedding(self._embed(ids)), own.pre_fc_norm_hidden(hidden)), -1)
        angles = self._angles(hidden[None], position_ids=positions[None])
        out = own.layer(own.fc(x)[None], position_embeddings=angles, attention_mask=None)[0]
        out = own.norm(out if rows is None else out.index_select(0, rows))
        assert self._head.packed is not None
        return out, ops.linear(out, self._head.packed, self._head.bias(0), impl=self._head.impl)


def load_mtp(folder: Path, base: BaseModel, impl: ops.Impl | None) -> MtpHead:
    """Load a base's own head. Raises BadRequest naming what is not supported."""
    config: Any = base.config
    if config.model_type not in TYPES:
        raise BadRequest(f"the base's own head is of the type {config.model_type}; served are {', '.join(TYPES)}")
    check_device(base)
    output: Any = base.module.get_output_embeddings()
    head = getattr(output, "shared", None)
    decoder: Any = decoder_of(base.module)
    if not isinstance(head, SharedInput) or head.packed is None or decoder is None:
        raise BadRequest("the base's own head needs its language model's head, whose weights are not known")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            names: list[str] = [name for name in opened.keys() if name.startswith(PREFIX)]  # noqa: SIM118
            tensors |= {
                name.removeprefix(PREFIX).replace("layers.0.", "layer."): opened.get_tensor(name) for name in names
            }
    own: Any = copy.deepcopy(config)
    own.layer_types, own.num_hidden_layers = ["full_attention"], 1
    own._attn_implementation = ATTENTION
    width, norm_of = base.width, type(decoder.norm)
    with torch.device("meta"):
        module = nn.ModuleDict(
            {
                "fc": nn.Linear(2 * width, width, bias=False),
                "pre_fc_norm_embedding": norm_of(width, config.rms_norm_eps),
                "pre_fc_norm_hidden": norm_of(width, config.rms_norm_eps),
                "layer": type(decoder.layers[0])(own, 0),
                "norm": norm_of(width, config.rms_norm_eps),
            }
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if different := sorted(name for name, _ in wanted.items() ^ found.items()):
        raise BadRequest(f"the base's own head lacks, or has in another shape or besides: {', '.join(different[:4])}")
    module.load_state_dict({name: tensor.to(base.device, base.dtype) for name, tensor in tensors.items()}, assign=True)
    attention = cast(nn.Module, module["layer"].self_attn)
    layer = PagedLayer(attention_call(attention, config), StepContext(), impl)
    bind(attention, layer)
    return MtpHead(base, module.eval().requires_grad_(False), layer, head)
