"""Reads kinds that put virtual tokens before a text, as embeddings or as keys and values.

Prompt tuning: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021. P-tuning: Liu et al.,
"GPT Understands, Too", 2021. Multitask prompt tuning: Wang et al., 2023. CPT: Blau et al., 2024. Prefix tuning: Li and
Liang, 2021. Cartridges: Eyuboglu et al., 2025. PEFT runs encoders and projections when saving, so that files contain
only their results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_adapters.json_values import is_list
from peft_adapters.kinds.kind import MAX_KIND_PRODUCTS, MAX_WHOLE, Field, choice, whole
from peft_adapters.reasons import Reasons, show
from peft_adapters.safetensors_header import FLOATS, TensorInfo
from peft_adapters.spec import AdapterSpec, VirtualTokens
from protocol.wire.messages import ServedModel, SiteShape

CLASSIFIES = "SEQ_CLS"
"""The task type of sequence classifiers, which save their head as a whole module."""

TENSOR = "prompt_embeddings"
COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"
SAVED_PREFIX = "base_model."
"""PEFT's prefix for the names of whole modules saved beside virtual tokens."""

_SIZES = ("token_dim", "num_layers", "num_attention_heads")
"""Fields that PEFT sets from the base model."""

_MAYBE_WHOLE = Field(
    None, lambda value: value is None or whole(1).valid(value), f"null or a whole number from 1 to {MAX_WHOLE}"
)
_FIELDS: dict[str, Field] = {
    "num_virtual_tokens": whole(0),
    **dict.fromkeys(_SIZES, _MAYBE_WHOLE),
    "num_transformer_submodules": choice(None, 1),
    "task_type": choice(None, "CAUSAL_LM", CLASSIFIES),
}
_TASKS = {
    "num_tasks": choice(1),  # requests cannot choose among several
    "num_ranks": whole(1),
}

_INIT = frozenset(
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
     "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}
)  # fmt: skip
NO_EFFECT: dict[str, frozenset[str]] = {
    "PROMPT_TUNING": _INIT,
    "MULTITASK_PROMPT_TUNING": _INIT,
    "P_TUNING": frozenset(
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
    ),
    "CPT": frozenset(
        {"cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
         "opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path"}
    ),
    "PREFIX_TUNING": frozenset({"init_weights", "encoder_hidden_size", "prefix_projection"}),
    "CARTRIDGE": frozenset({"num_frozen_tokens"}),
}  # fmt: skip
"""The kinds, with the fields of each that only training reads, or whose effect is in the tensors."""

PREFIXES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""Kinds whose virtual tokens are keys and values; the others have embeddings."""


_CLASSIFIERS = frozenset({"PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"})
"""Kinds that PEFT supports for sequence classifiers: CPT is only for text, and prefixes need a cache."""

_NOT_OF_PEFT = frozenset({"deepseek_v4"})
"""Model types on which PEFT's own forward fails with embeddings, because layers read the ids."""


def is_virtual(peft_type: Any) -> bool:
    """Return whether a config's `peft_type` is a kind with virtual tokens."""
    return isinstance(peft_type, str) and peft_type in NO_EFFECT


def fields_of(kind: str) -> dict[str, Field]:
    """Return the significant fields of a kind."""
    return _FIELDS | _TASKS if kind == "MULTITASK_PROMPT_TUNING" else _FIELDS


def canonical_virtual(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the significant fields of a config, without those at their defaults."""
    fields = fields_of(config["peft_type"])
    given = {key: config[key] for key, field in fields.items() if key in config and config[key] != field.default}
    saved: Any = config.get("modules_to_save")
    if is_list(saved) and all(isinstance(name, str) for name in saved):
        saved = sorted(set(saved))
    return {"peft_type": config["peft_type"], **given, **({"modules_to_save": saved} if saved else {})}


def virtual_tensors(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Return a file's tensors of virtual tokens, and those of whole saved modules."""
    own = {name: info for name, info in tensors.items() if not name.startswith(SAVED_PREFIX)}
    return own, {name: info for name, info in tensors.items() if name not in own}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one adapter, and collects the reasons against it."""

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    reasons: Reasons

    def check_fields(self, ignored: frozenset[str]) -> None:
        known = {"peft_type", *fields_of(self.kind), *NO_EFFECT[self.kind], *ignored}
        for key, value in self.config.items():
            if key == "modules_to_save":
                if value and self.config.get("task_type") != CLASSIFIES:
                    text = f"modules_to_save beside the virtual tokens of {self.kind} is not served"
                    self.reasons.add(f"{text} but with task_type {CLASSIFIES}")
            elif value and key not in known:
                self.reasons.add("config fields that are not understood", key)
        for key, field in fields_of(self.kind).items():
            value = self.config.get(key, field.default)
            if not field.valid(value):
                self.reasons.add(f"{key} {show(value)} of {self.kind} is not {field.wants}")

    def check_size(self, name: str, wanted: int) -> None:
        """Add a reason if a field contradicts the base."""
        value = self.config.get(name)
        if value is not None and value != wanted:
            self.reasons.add(f"{name} is {value} where the base model has {wanted}")

    def check_tensors(self, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
        """Add a reason for each tensor that is missing, unknown, or has a wrong dtype or shape (None: any size)."""
        for name, shape in shapes.items():
            info = self.tensors.get(name)
            if info is None:
                self.reasons.add("tensors missing", name)
                continue
            fits = len(info.shape) == len(shape) and all(
                want in (None, have) for want, have in zip(shape, info.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                self.reasons.add(f"{name} has shape {list(info.shape)} where config and base model want [{wanted}]")
            if info.dtype not in FLOATS:
                self.reasons.add(f"{name} has dtype {info.dtype}")
        for name in sorted(self.tensors.keys() - shapes.keys()):
            self.reasons.add("tensors that are not understood", name)


def read_virtual(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    base: ServedModel | None,
    reasons: Reasons,
    ignored: frozenset[str],
) -> AdapterSpec:
    """Return an adapter's virtual tokens; meaningless if reasons were added.

    base: None to check without a model. ignored: fields without effect in every kind. Tensors are not processed here:
    what a worker computes from them is as large as the file's own tensors.
    """
    kind: str = config["peft_type"]
    reader = _Reader(kind, config, tensors, reasons)
    reader.check_fields(ignored)
    num: Any = config.get("num_virtual_tokens", 0)
    if type(num) is not int or num < 1:
        reasons.add(f"num_virtual_tokens {show(num)} of {kind} is not a whole number from 1 to {MAX_WHOLE}")
    if reasons:
        return AdapterSpec(())
    classifies = config.get("task_type") == CLASSIFIES
    if classifies and kind not in _CLASSIFIERS:
        reasons.add(f"PEFT does not compute {kind} with task_type {CLASSIFIES}")
    if base is not None:
        _check_base(kind, num, base, reasons, classifies=classifies)
    if kind in PREFIXES:
        return _spec(_read_prefix(reader, num, base))
    return _spec(_read_prompt(reader, num, base))


def _spec(virtual: VirtualTokens) -> AdapterSpec:
    return AdapterSpec((), virtual=virtual, unscaled=virtual.kind)


def _check_base(kind: str, num: int, base: ServedModel, reasons: Reasons, *, classifies: bool) -> None:
    if classifies and not base.label_head:
        reasons.add(f"{kind} with task_type {CLASSIFIES} is not served on a base model without a classifier's head")
    if not classifies and not base.does("generate"):
        reasons.add(f"{kind} is not served on a base model that generates no text")
    if base.max_model_len and num > base.max_model_len - 2:
        reasons.add(
            f"num_virtual_tokens is {num}: this base model takes at most {base.max_model_len} tokens, of which "
            f"prompt and output need two, so that {max(base.max_model_len - 2, 0)} may be virtual"
        )
    if base.model_type in _NOT_OF_PEFT:
        reasons.add(f"PEFT does not compute virtual tokens on {base.model_type}")
    by_layer = [site.name for site in base.sites if site.kind == "embedding" and site.name.endswith("_per_layer")]
    if by_layer:
        reasons.add(f"{kind} is not served where a model embeds tokens in every layer", by_layer[0])
    if _input_of(base) is None:
        reasons.add(f"{kind} is not served on a base model whose input embedding cannot be adapted")


def _input_of(base: ServedModel) -> SiteShape | None:
    return next((site for site in base.sites if site.kind == "embedding" and site.in_features == base.vocab_size), None)


def _read_prompt(reader: _Reader, num: int, base: ServedModel | None) -> VirtualTokens:
    """Read embeddings [num, width]; for multitask prompt tuning also two matrices whose product multiplies them."""
    site = None if base is None else _input_of(base)
    width = None if site is None else site.out_features
    if width is not None:
        reader.check_size("token_dim", width)
    shapes: dict[str, tuple[int | None, ...]] = {TENSOR: (num, width)}
    task: tuple[str, ...] = ()
    if reader.kind == "MULTITASK_PROMPT_TUNING":
        rank = reader.config.get("num_ranks", 1)
        shapes |= {COLUMNS: (1, num, rank), ROWS: (1, rank, width)}
        task = (COLUMNS, ROWS)
        if width is not None and num * rank * width > MAX_KIND_PRODUCTS:
            limit = f"where {MAX_KIND_PRODUCTS} are served"
            reader.reasons.add(f"{reader.kind} takes {num * rank * width} multiplications to load, {limit}")
    reader.check_tensors(shapes)
    return VirtualTokens(reader.kind, num, TENSOR, "" if site is None else site.name, task=task)


def _read_prefix(reader: _Reader, num: int, base: ServedModel | None) -> VirtualTokens:
    """Read keys and values [num, layers * 2 * heads * entries]; each layer's keys precede its values."""
    shape = None if base is None else base.prefix
    if shape is None:
        reader.check_tensors({TENSOR: (num, None)})
        return VirtualTokens(reader.kind, num, TENSOR)
    if not shape:
        reader.reasons.add(
            f"{reader.kind} is not served on a base model that does not keep keys and values, of one shape, in every "
            "layer"
        )
        return VirtualTokens(reader.kind, num, TENSOR)
    layers, heads, entries = shape
    for name, wanted in zip(_SIZES, (heads * entries, layers, heads), strict=True):
        reader.check_size(name, wanted)
    reader.check_tensors({TENSOR: (num, layers * 2 * heads * entries)})
    return VirtualTokens(reader.kind, num, TENSOR, shape=(layers, heads, entries))
