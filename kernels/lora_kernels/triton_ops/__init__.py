"""The operations as Triton kernels, for CUDA and HIP tensors. Needs triton; `ops.py` imports this on first use.

Products with base weights (unless sums are fixed), scans, delta rules, convolutions, masks and argmax use torch. With
TRITON_INTERPRET=1 in the environment before the first import, the same kernels run on CPU tensors, which is how they
are tested without a GPU.
"""

from lora_kernels.reference import (
    argmax,
    causal_conv,
    decoder_stack,
    delta_rule,
    experts,
    gate_heads_,
    gated_delta,
    gated_scan,
    grouped_linear,
    mask_logits_,
    pack_linear,
)
from lora_kernels.triton_ops.attention import paged_attention
from lora_kernels.triton_ops.lora import lora_add_
from lora_kernels.triton_ops.matmul import linear
from lora_kernels.triton_ops.pointwise import gated_act, kv_write_, rms_norm, rotary_
from lora_kernels.triton_ops.scan import selective_scan
