"""An EAGLE-3 head by its published definition, in fp32: SafeAILab/EAGLE, eagle/model/cnets.py."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from oracle.peft_oracle import Oracle
from torch import Tensor

WIDTH, HEADS = 64, 4
TAPS = (2, 4, 5)  # published: inputs of layers 2, n // 2 and n - 3; the tests' base has n = 8
EPS = 1e-5

Tensors = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotated(x: Tensor) -> Tensor:
    """Return heads [T, H, D], each rotated by the angles of its position."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def layer(own: Tensors, embeds: Tensor, hidden: Tensor) -> Tensor:
    """Return the head's hidden states [T, D] from the embeddings and hidden states of T tokens.

    As in `LlamaDecoderLayeremb` there: attention reads both, normalized and concatenated.
    """

    def mid(name: str, x: Tensor) -> Tensor:
        return F.linear(x, own[f"midlayer.{name}.weight"])

    x = torch.cat(
        (norm(embeds, own["midlayer.input_layernorm.weight"]), norm(hidden, own["midlayer.hidden_norm.weight"])), -1
    )
    q, k, v = (mid(f"self_attn.{name}_proj", x).view(len(x), HEADS, -1) for name in "qkv")
    scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) * (WIDTH // HEADS) ** -0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(len(x), -1)
    hidden = hidden + mid("self_attn.o_proj", attended)
    x = norm(hidden, own["midlayer.post_attention_layernorm.weight"])
    return hidden + mid("mlp.down_proj", F.silu(mid("mlp.gate_proj", x)) * mid("mlp.up_proj", x))


def by_definition(
    own: Tensors, oracle: Oracle, name: str, text: np.ndarray, num: int, start: int = 0
) -> tuple[list[int], list[Tensor]]:
    """Return `num` draft tokens after a text under an adapter, and the logits of each. start: the head's first token.

    The base's hidden states of each token are paired with the next token's embedding. After the text, the head's own
    hidden states before its last norm take their place (`topK_genrate` there, with a tree of one branch).
    """
    ids = torch.from_numpy(text.astype(np.int64))[start:]
    with torch.inference_mode(), oracle._under(name) as model:
        states = model(input_ids=torch.from_numpy(text.astype(np.int64))[None], output_hidden_states=True).hidden_states
        embedding = oracle.untouched.get_input_embeddings()
        hidden = F.linear(torch.cat([states[i][0, start:-1] for i in TAPS], -1), own["fc.weight"])
        tokens, found, logits = ids[1:].tolist(), list[int](), list[Tensor]()
        for _ in range(num):
            out = layer(own, embedding(torch.tensor(tokens)), hidden)[-1]
            logits.append(F.linear(norm(out, own["norm.weight"]), own["lm_head.weight"]))
            token = int(logits[-1].argmax())
            found.append(token + int(own["d2t"][token]))
            tokens.append(found[-1])
            hidden = torch.cat((hidden, out[None]))
    return found, logits
