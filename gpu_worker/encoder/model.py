"""An encoder as base model: Hugging Face's BERT, RoBERTa and similar, whose linear layers are LoRA sites.

A step is one forward pass over packed whole texts; each token sees all of its own text. If the attention cannot be
replaced, as in DeBERTa and MPNet with their relative position biases, each text has a separate pass. Nothing is cached.
Trial runs show which layers attend, and the finished model is compared with the untouched one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.encoder.head import Classifier, reads_first_alone
from gpu_worker.layers.adaptable_modules import AdaptableModules, find_adaptable_modules
from gpu_worker.layers.attention import ATTENTION, AttentionCall, StepContext, bind
from gpu_worker.layers.lora import SharedInput, SiteInfo, install_sites, linear_shape
from gpu_worker.loading.checkpoint import refusal, refuse_what_cannot_run, takes_positions
from gpu_worker.memory import send
from gpu_worker.model.logits_check import CHECK_LIMITS, spread_of
from gpu_worker.model.model import fingerprint_of
from gpu_worker.model.trial import NUM_HEAD_ROWS, NUM_TOKENS, Trial, WatchedPass, run_encoder_trial, watch_passes
from gpu_worker.tasks.labels import labels_of
from gpu_worker.tasks.pooling import Pooling
from lora_kernels import ops
from protocol.wire.messages import Task

MIXING = ("mobilebert",)
"""Model types whose embeddings mix neighboring tokens."""


@dataclass(frozen=True, slots=True)
class TextInputs:
    """A group of a step's texts of similar length, padded to the longest."""

    rows: Tensor  # int64 [S, L], rows of the packed step; for padding, any row of the text
    is_token: Tensor | None  # bool [S, L]; None: no padding


@dataclass(slots=True)
class EncoderContext(StepContext):
    """A step's work lists; each text is in exactly one group."""

    texts: list[TextInputs] = field(default_factory=list)


class EncoderLayer:
    """One module's attention: bidirectional within each text, or within a window around each token."""

    def __init__(self, call: AttentionCall, context: EncoderContext) -> None:
        self.context = context
        self.window = call.window  # token i sees token j if |i - j| < window; 0: all tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
        """Return the attention [T, Hq, Dv] of q [T, Hq, D] over k [T, Hkv, D] and v [T, Hkv, Dv]."""
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

    def _mask(self, texts: TextInputs) -> Tensor | None:
        """Return which keys are visible: bool, broadcastable to [S, H, L, L]; None: all of them."""
        mask = None if texts.is_token is None else texts.is_token[:, None, None, :]
        length = texts.rows.shape[1]
        if not 0 < self.window < length:
            return mask
        at = torch.arange(length, device=texts.rows.device)
        near = (at[:, None] - at).abs() < self.window
        return near if mask is None else mask & near


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """The packed texts of a step, on the device."""

    lengths: list[int]
    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    types: Tensor | None  # int64 [T]; None: all 0


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
    width: int  # size of a hidden state, or the number of labels of a token or text
    pooling: Pooling
    max_positions: int  # maximum tokens of a text; 0: no known limit
    padding_id: int | None  # RoBERTa: positions start after this id, and padding has no position; None: they start at 0
    fingerprint: str
    takes_types: bool = False  # whether type ids mark the second text of a pair
    classifier: Classifier | None = None  # for the task `score`
    label_head: str = ""  # for the task `score`: the layer that computes the logits
    missing: list[str] = field(default_factory=list[str])  # layers of the head that adapters must bring
    apart: bool = False  # whether each text has a separate forward pass, because its attention cannot be packed

    @property
    def config(self) -> Any:
        """The model's Hugging Face config."""
        return self.module.config

    @property
    def vocab_size(self) -> int:
        """The vocabulary size."""
        return self.config.vocab_size

    @property
    def labels(self) -> list[str]:
        """Label names of tokens or texts, by index; empty for embeddings, or without a head."""
        return [] if self.task == "embed" or self.missing else labels_of(self.config)

    def prepare(self, texts: Sequence[np.ndarray], seconds: Sequence[int] = ()) -> EncoderInputs:
        """Return packed texts on the device, and set their groups in the context.

        texts: int [L] each, none empty. seconds: where the second text of each pair begins, 0 for single texts; [] if
        all are single.
        """
        lengths = [len(text) for text in texts]
        self.context.texts = group_texts(lengths, self.device)
        positions = np.concatenate([positions_of(text, self.padding_id) for text in texts])
        types = None
        if self.takes_types and any(seconds):
            types = np.concatenate([types_of(num, second) for num, second in zip(lengths, seconds, strict=True)])
            types = send(types, self.device)
        ids = np.concatenate(texts).astype(np.int64)
        return EncoderInputs(lengths, send(ids, self.device), send(positions, self.device), types)

    def forward(self, inputs: EncoderInputs, set_text: Callable[[int], object] = lambda _: None) -> Tensor:
        """Return a packed step's hidden states [T, D], or for token labels their logits [T, labels].

        set_text: sets the adapters of one text, by index, if texts have separate forward passes.
        """
        if not self.apart:
            return self._states(inputs.ids, inputs.types, position_ids=inputs.positions[None])
        types = [None] * len(inputs.lengths) if inputs.types is None else inputs.types.split(inputs.lengths)
        found: list[Tensor] = []
        for i, (text, own) in enumerate(zip(inputs.ids.split(inputs.lengths), types, strict=True)):
            set_text(i)
            found.append(self._states(text, own, attention_mask=torch.ones_like(text)[None]))
        return torch.cat(found)

    def _states(self, ids: Tensor, types: Tensor | None, **more: Tensor) -> Tensor:
        if types is not None:
            more["token_type_ids"] = types[None]
        body = self.module if self.classifier is None else self.classifier.body
        if self.apart and ids[0] < 0:  # like PEFT for virtual tokens: without ids some count positions differently
            more["inputs_embeds"] = body.get_input_embeddings()(ids[None])
        else:
            more["input_ids"] = ids[None]
        out = body(**more)
        return out.logits[0] if self.task == "classify" else out.last_hidden_state[0]

    def score(
        self, inputs: EncoderInputs, hidden: Tensor, set_adapters: Callable[[Sequence[int]], object] = lambda _: None
    ) -> list[Tensor]:
        """Return the logits [N] of each text, from a step's hidden states [T, D].

        set_adapters: sets the adapters of some texts, by index, for the head's rows. N is the base's number of labels,
        or more if adapters have heads of their own.
        """
        assert self.classifier is not None
        ends = np.cumsum(inputs.lengths).tolist()
        starts = [end - length for end, length in zip(ends, inputs.lengths, strict=True)]
        found: list[Tensor] = []
        for members, states in self.classifier.groups(hidden, starts, ends):
            set_adapters(members)
            found += self.classifier.logits(states)
        return found


def group_texts(lengths: Sequence[int], device: torch.device) -> list[TextInputs]:
    """Group packed texts by length, so that less than half of each group is padding."""
    starts = np.cumsum(lengths) - lengths
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(i)
    found: list[TextInputs] = []
    for members in groups.values():
        own = np.array([lengths[i] for i in members])
        at = np.arange(own.max())
        is_token = at < own[:, None]
        rows = starts[members][:, None] + np.minimum(at, own[:, None] - 1)
        found.append(TextInputs(send(rows, device), None if is_token.all() else send(is_token, device)))
    return found


def positions_of(text: np.ndarray, padding_id: int | None) -> np.ndarray:
    """Return the positions, int64 [L], that a model gives a text by default; see `EncoderModel.padding_id`.

    After virtual tokens (ids below 0) padding counts too: transformers then gets no ids to compare.
    """
    if padding_id is None:
        return np.arange(len(text))
    counts = (text != padding_id) | (text[0] < 0)
    return np.cumsum(counts) * counts + padding_id


def types_of(length: int, second: int) -> np.ndarray:
    """Return the type ids, int64 [L], of a text whose second part begins at `second`; 0: no second part."""
    return (np.arange(length) >= second).astype(np.int64) if second else np.zeros(length, np.int64)


# ---------------------------------------------------------------- from a Hugging Face model


def prepare_encoder(
    module: PreTrainedModel,
    task: Task,
    impl: ops.Impl | None,
    pooling: Pooling | None = None,
    missing: Sequence[str] = (),
    has_types: bool = True,
) -> EncoderModel:
    """Turn a Hugging Face encoder into one that runs packed steps. Changes `module`.

    impl: the kernels' implementation; None: the device's default. pooling: for embeddings. missing: tensors of the head
    that the folder lacks, which adapters must bring. has_types: whether the tokenizer has type ids. Raises BadRequest
    for what is not supported.
    """
    pooling = pooling or Pooling()
    apart = _runs_apart(module)
    fingerprint, device, dtype = fingerprint_of(module), module.device, module.dtype
    with refuse_what_cannot_run(module), torch.inference_mode():
        probe = Probe.of(module, task)
        padding_id = _padding_id(module, task, probe) if takes_positions(module) else None
        sees_first = task == "score" and reads_first_alone(Classifier.of(module), probe.states[0][None])
        if not apart:
            module.set_attn_implementation(ATTENTION)
        trial = _trial(module, task, apart=apart)
    if not apart:
        _refuse_calls(module, trial)
    label_head = _label_head(module, trial) if task == "score" else ""
    context = EncoderContext()
    for call in trial.attention:
        bind(call.module, EncoderLayer(call, context))
    names = {child: name for name, child in module.named_modules()}
    sites, shared = install_sites(
        module, trial.linears, {names[call.module] for call in trial.attention}, context, impl
    )
    adaptable = find_adaptable_modules(module, trial.per_token, sites, shared, context, impl)
    adaptable.watch()
    longest = getattr(module.config, "max_position_embeddings", None) or 0
    if longest and padding_id is not None:
        longest -= padding_id + 1
    mark = f":{','.join(missing)}" if missing else ""
    model = EncoderModel(
        module=module, device=device, dtype=dtype, context=context, sites=sites, shared=shared, adaptable=adaptable,
        task=task, width=probe.found[0].shape[-1], pooling=pooling, max_positions=longest, padding_id=padding_id,
        fingerprint=f"{fingerprint}:{task}:{pooling.mode}:{pooling.unit_length}{mark}",
        takes_types=has_types and takes_types(module),
        classifier=Classifier.of(module, sees_first=sees_first) if task == "score" else None, label_head=label_head,
        missing=_missing_sites(module, missing, sites), apart=apart,
    )  # fmt: skip
    _check(model, probe)
    return model


def takes_types(module: PreTrainedModel) -> bool:
    """Return whether a model uses type ids to mark the second text of a pair."""
    takes = "token_type_ids" in inspect.signature(module.forward).parameters
    return takes and (getattr(module.config, "type_vocab_size", None) or 0) > 1


def _missing_sites(module: PreTrainedModel, missing: Sequence[str], sites: Sequence[SiteInfo]) -> list[str]:
    """Return the layers that missing tensors belong to. Raises BadRequest for one that no adapter can bring."""
    layers = sorted({name.rpartition(".")[0] for name in missing})
    if others := sorted(set(layers) - {site.name for site in sites}):
        raise refusal(module, [f"no weights for {', '.join(others)}, which adapters cannot bring"])
    return layers


def _trial(module: PreTrainedModel, task: Task, *, apart: bool) -> Trial:
    """Run a few tokens through a model, and for a classifier of texts some rows through its head."""
    if task != "score" and not apart:
        return run_encoder_trial(module)
    classifier = Classifier.of(module) if task == "score" else None

    def run(num_tokens: int, num_rows: int) -> None:
        ids = torch.arange(num_tokens, device=module.device)[None]
        more = {"attention_mask": torch.ones_like(ids)} if apart else {"position_ids": ids}
        if classifier is None:
            module(input_ids=ids, **more)
            return
        hidden = classifier.body(input_ids=ids, **more).last_hidden_state[0]
        classifier.logits(hidden[:num_rows, None])

    sizes = ((NUM_TOKENS, NUM_HEAD_ROWS), (2 * NUM_TOKENS + 1, NUM_HEAD_ROWS + 1))
    passes = [WatchedPass(num, rows, partial(run, num, rows)) for num, rows in sizes]
    return watch_passes(module, passes, any_rows=apart)


def _label_head(module: PreTrainedModel, trial: Trial) -> str:
    """Return the layer that computes a classifier's logits, the head's last. Raises BadRequest unless it is linear."""
    last = next((call.name for call in reversed(trial.linears) if call.is_head), "")
    shape = linear_shape(module.get_submodule(last)) if last else None
    if shape is None or shape[0] != module.config.num_labels:
        raise refusal(module, ["a head that does not end in a linear layer"])
    return last


def _runs_apart(module: PreTrainedModel) -> bool:
    """Return whether texts need separate passes: the attention cannot be replaced, or other parts mix tokens too."""
    if module.config.model_type in MIXING or getattr(module.config, "token_dropout", False):
        return True
    return not module._supports_attention_backend or not takes_positions(module)


def _refuse_calls(module: PreTrainedModel, trial: Trial) -> None:
    """Raise BadRequest for unsupported attention calls of a trial run."""
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


@dataclass(frozen=True, slots=True)
class Probe:
    """Random texts with the untouched model's results for each alone, against which the finished model is checked."""

    texts: list[Tensor]  # int64 [T]
    seconds: list[int]  # index of each pair's second text, 0 for single texts
    states: list[Tensor]  # hidden states [T, D], or for token labels their logits [T, labels]
    found: list[Tensor]  # the same; for `score` the logits [1, labels]

    @classmethod
    def of(cls, module: PreTrainedModel, task: Task) -> Probe:
        """Run a model on random texts, some of which exceed a short sliding window."""
        window = getattr(module.config, "sliding_window", None) or 0
        longest = 2 * window + 8 if 4 < window <= 256 else 24
        generator = torch.Generator().manual_seed(0)
        lengths = (longest, longest - 7, 3)
        texts = [torch.randint(module.config.vocab_size, (num,), generator=generator) for num in lengths]
        texts = [text.to(module.device) for text in texts]
        seconds = [0, 5, 0] if task == "score" and takes_types(module) else [0] * len(texts)
        states = [states_of(module, task, *pair) for pair in zip(texts, seconds, strict=True)]
        found = states
        if task == "score":
            found = [_untouched(module, *pair).logits for pair in zip(texts, seconds, strict=True)]
        return cls(texts, seconds, states, found)


def states_of(
    module: PreTrainedModel, task: Task, text: Tensor, second: int = 0, positions: Tensor | None = None
) -> Tensor:
    """Return the untouched model's result for a single text, before any head of whole texts: see `Probe.states`."""
    if task == "classify":
        return _untouched(module, text, second, positions).logits[0]
    body: Any = module.base_model
    return _untouched(body, text, second, positions).last_hidden_state[0]


def _untouched(module: Any, text: Tensor, second: int, positions: Tensor | None = None) -> Any:
    own = {} if positions is None else {"position_ids": positions[None]}
    if second:
        own["token_type_ids"] = torch.from_numpy(types_of(len(text), second)).to(text.device)[None]
    return module(input_ids=text[None], attention_mask=torch.ones_like(text)[None], **own)


def _padding_id(module: PreTrainedModel, task: Task, probe: Probe) -> int | None:
    """Determine how a model numbers positions by default. Raises ValueError if in neither known way."""
    text, expected = probe.texts[0], probe.states[0]
    for padding_id in (None, module.config.pad_token_id):
        positions = torch.from_numpy(positions_of(text.cpu().numpy(), padding_id)).to(text.device)
        if spread_of([states_of(module, task, text, 0, positions)], [expected]) < CHECK_LIMITS[module.dtype]:
            return padding_id
    raise ValueError("it numbers positions in an unknown way")


def _check(model: EncoderModel, probe: Probe) -> None:
    """Compare the finished model with the untouched one. Raises BadRequest if they differ."""
    with torch.inference_mode():
        inputs = model.prepare([text.cpu().numpy() for text in probe.texts], probe.seconds)
        error, limit = spread_of([model.forward(inputs)], probe.states), CHECK_LIMITS[model.dtype]
        if not error < limit:
            what = f"outputs that are off by {error:.2g} of their spread when texts are packed ({limit:.2g})"
            raise refusal(model.module, [what])
        if model.task != "score":
            return
        got = torch.stack(model.score(inputs, torch.cat(probe.states))).float()
    expected = torch.cat(probe.found).float()
    error = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()  # a spread needs more numbers
    if not error < limit:
        raise refusal(model.module, [f"logits that are off by {error:.2g} of their size when texts are packed"])
