"""An encoder as base model: Hugging Face's BERT, RoBERTa and the like, whose linear layers are LoRA sites.

A step is one forward pass over whole texts, packed one after the other; each token sees all of its own text. Nothing is
cached. Trial runs show which layers attend, and the finished model is compared with the untouched one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.encoder.pooling import Pooling
from gpu_worker.memory import send
from gpu_worker.model.adaptable_modules import AdaptableModules, find_adaptable_modules
from gpu_worker.model.attention import ATTENTION, AttentionCall, StepContext, bind
from gpu_worker.model.checkpoint import refusal, refuse_what_cannot_run
from gpu_worker.model.logits_check import CHECK_LIMITS, spread_of
from gpu_worker.model.lora import SharedInput, SiteInfo, install_sites
from gpu_worker.model.model import fingerprint_of
from gpu_worker.model.trial import Trial, run_encoder_trial
from lora_kernels import ops
from protocol.wire.messages import Task


@dataclass(frozen=True, slots=True)
class Texts:
    """A group of a step's texts of similar length, padded to the longest of them."""

    rows: Tensor  # int64 [S, L]: rows of the packed step; at padding, any row of the text
    is_token: Tensor | None  # bool [S, L]; None: there is no padding


@dataclass(slots=True)
class EncoderContext(StepContext):
    """A step's work lists; each text is in one of the groups."""

    texts: list[Texts] = field(default_factory=list)


class EncoderLayer:
    """One module's attention: in both directions within each text, or within a window around each token."""

    def __init__(self, call: AttentionCall, context: EncoderContext) -> None:
        self.context = context
        self.window = call.window  # token i sees token j if |i - j| < window; 0: all of them

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
        """Attend with q [T, Hq, D] over k [T, Hkv, D] and v [T, Hkv, Dv]: [T, Hq, Dv]."""
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for texts in self.context.texts:
            parts = [tensor[texts.rows].transpose(1, 2) for tensor in (q, k, v)]  # [S, H, L, D]
            found = F.scaled_dot_product_attention(
                *parts, attn_mask=self._mask(texts), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            found = found.transpose(1, 2)
            if texts.is_token is None:
                out[texts.rows] = found
            else:
                out[texts.rows[texts.is_token]] = found[texts.is_token]
        return out

    def _mask(self, texts: Texts) -> Tensor | None:
        """Return which keys are seen: bool that broadcasts to [S, H, L, L]; None: all of them."""
        mask = None if texts.is_token is None else texts.is_token[:, None, None, :]
        length = texts.rows.shape[1]
        if not 0 < self.window < length:
            return mask
        at = torch.arange(length, device=texts.rows.device)
        near = (at[:, None] - at).abs() < self.window
        return near if mask is None else mask & near


@dataclass(slots=True)
class EncoderModel:
    """A loaded encoder, ready for packed steps."""

    module: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    context: EncoderContext
    sites: list[SiteInfo]
    shared: list[SharedInput]
    adaptable: AdaptableModules
    task: Task
    width: int  # entries of a token's hidden state, or its labels
    pooling: Pooling
    max_positions: int  # tokens of the longest text; 0: no limit known
    padding_id: int | None  # where positions start behind this id and skip it, as RoBERTa's; None: they start at 0
    fingerprint: str

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self.module.config

    @property
    def vocab_size(self) -> int:
        """Token ids of the model."""
        return self.config.vocab_size

    @property
    def labels(self) -> list[str]:
        """Names of the labels that tokens get, by index; none for embeddings."""
        names: dict[int, str] = self.config.id2label if self.task == "classify" else {}
        return [names[index] for index in sorted(names)]

    def prepare(self, texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return the ids and positions, int64 [T] each, of packed texts; sets their groups in the context.

        texts: int [L] each, none empty.
        """
        self.context.texts = group_texts([len(text) for text in texts], self.device)
        positions = np.concatenate([positions_of(text, self.padding_id) for text in texts])
        return send(np.concatenate(texts).astype(np.int64), self.device), send(positions, self.device)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return a packed step's hidden states [T, D], or for labels their logits [T, labels]; ids, positions: [T]."""
        out = self.module(input_ids=input_ids[None], position_ids=position_ids[None])
        return out.logits[0] if self.task == "classify" else out.last_hidden_state[0]


def group_texts(lengths: Sequence[int], device: torch.device) -> list[Texts]:
    """Group packed texts by length, so that less than half of a group is padding."""
    starts = np.cumsum(lengths) - lengths
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(i)
    found: list[Texts] = []
    for members in groups.values():
        own = np.array([lengths[i] for i in members])
        at = np.arange(own.max())
        is_token = at < own[:, None]
        rows = starts[members][:, None] + np.minimum(at, own[:, None] - 1)
        found.append(Texts(send(rows, device), None if is_token.all() else send(is_token, device)))
    return found


def positions_of(text: np.ndarray, padding_id: int | None) -> np.ndarray:
    """Return the positions, int64 [L], that a model gives a text by itself; see `EncoderModel.padding_id`."""
    if padding_id is None:
        return np.arange(len(text))
    counts = text != padding_id
    return np.cumsum(counts) * counts + padding_id


# ---------------------------------------------------------------- from a Hugging Face model


def prepare_encoder(
    module: PreTrainedModel, task: Task, impl: ops.Impl | None, pooling: Pooling | None = None
) -> EncoderModel:
    """Turn a Hugging Face encoder into one that runs packed steps. Changes `module`.

    impl: of the kernels; None: the best for the device. pooling: for embeddings. Raises BadRequest for what is not
    served.
    """
    pooling = pooling or Pooling()
    _refuse_module(module)
    fingerprint, device, dtype = fingerprint_of(module), module.device, module.dtype
    with refuse_what_cannot_run(module), torch.inference_mode():
        texts = _random_texts(module)
        expected = [_untouched(module, task, text) for text in texts]
        padding_id = _padding_id(module, task, texts[0], expected[0])
        module.set_attn_implementation(ATTENTION)
        trial = run_encoder_trial(module)
    _refuse_calls(module, trial)
    context = EncoderContext()
    for call in trial.attention:
        bind(call.module, EncoderLayer(call, context))
    names = {child: name for name, child in module.named_modules()}
    sites, shared = install_sites(
        module, trial.linears, {names[call.module] for call in trial.attention}, context, impl
    )
    adaptable = find_adaptable_modules(module, trial.per_token, sites, shared, context)
    adaptable.watch()
    longest = getattr(module.config, "max_position_embeddings", None) or 0
    if longest and padding_id is not None:
        longest -= padding_id + 1
    model = EncoderModel(
        module=module, device=device, dtype=dtype, context=context, sites=sites, shared=shared, adaptable=adaptable,
        task=task, width=expected[0].shape[-1], pooling=pooling, max_positions=longest, padding_id=padding_id,
        fingerprint=f"{fingerprint}:{task}:{pooling.mode}:{pooling.unit_length}",
    )  # fmt: skip
    _check(model, texts, expected)
    return model


def _refuse_module(module: PreTrainedModel) -> None:
    """Raise BadRequest for what a model's class and configuration show not to be served."""
    reasons = []
    if not module._supports_attention_backend:
        reasons.append("attention that cannot be replaced (no AttentionInterface)")
    if "position_ids" not in inspect.signature(module.forward).parameters:
        reasons.append("no way to be told the tokens' positions")
    if getattr(module.config, "token_dropout", False):
        reasons.append("embeddings scaled by how much of a batch is masked (token_dropout)")
    if reasons:
        raise refusal(module, reasons)


def _refuse_calls(module: PreTrainedModel, trial: Trial) -> None:
    """Raise BadRequest for attention calls of a trial run that are not served."""
    reasons = []
    calls = trial.attention
    if len(calls) < module.config.num_hidden_layers:
        reasons.append(f"{len(calls)} attention calls for {module.config.num_hidden_layers} layers")
    if any(call.is_causal for call in calls):
        reasons.append("attention in one direction")
    if any(call.mask is not None for call in calls):
        reasons.append("attention with a mask of its own making")
    if any(call.softcap or call.sinks is not None for call in calls):
        reasons.append("attention with a softcap or sinks")
    if reasons:
        raise refusal(module, reasons)


def _random_texts(module: PreTrainedModel) -> list[Tensor]:
    """Return random texts to compare the finished model with the untouched one on; they pass a short window."""
    window = getattr(module.config, "sliding_window", None) or 0
    longest = 2 * window + 8 if 4 < window <= 256 else 24
    generator = torch.Generator().manual_seed(0)
    lengths = (longest, longest - 7, 3)
    texts = [torch.randint(module.config.vocab_size, (num,), generator=generator) for num in lengths]
    return [text.to(module.device) for text in texts]


def _untouched(module: PreTrainedModel, task: Task, text: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return what the untouched model makes of a text alone: hidden states or logits, [T, …]."""
    own = {} if positions is None else {"position_ids": positions[None]}
    out = module(input_ids=text[None], attention_mask=torch.ones_like(text)[None], **own)
    return out.logits[0] if task == "classify" else out.last_hidden_state[0]


def _padding_id(module: PreTrainedModel, task: Task, text: Tensor, expected: Tensor) -> int | None:
    """Find out how a model numbers positions by itself. Raises ValueError if it does so in neither known way."""
    for padding_id in (None, module.config.pad_token_id):
        positions = torch.from_numpy(positions_of(text.cpu().numpy(), padding_id)).to(text.device)
        if spread_of([_untouched(module, task, text, positions)], [expected]) < CHECK_LIMITS[module.dtype]:
            return padding_id
    raise ValueError("it numbers positions in an unknown way")


def _check(model: EncoderModel, texts: list[Tensor], expected: list[Tensor]) -> None:
    """Compare the finished model with the untouched one. Raises BadRequest if they differ."""
    with torch.inference_mode():
        got = model.forward(*model.prepare([text.cpu().numpy() for text in texts]))
    error, limit = spread_of([got], expected), CHECK_LIMITS[model.dtype]
    if not error < limit:
        raise refusal(
            model.module, [f"outputs that are off by {error:.2g} of their spread when texts are packed ({limit:.2g})"]
        )
