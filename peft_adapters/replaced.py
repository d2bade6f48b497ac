"""Reads an adapter's replacements: trained rows of embeddings, whole parameters, and thereby the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from peft_adapters.matching import TensorMatcher
from peft_adapters.spec import ReplacedWeights, TrainedTokens
from protocol.wire.messages import MAX_LABELS, OPAQUE, SiteShape

WRAPPED, TOKENS_WRAPPED, ORIGINAL, SAVED_TWICE = (
    ".base_layer",
    ".token_adapter.base_layer",
    ".original_module",
    ".modules_to_save",
)
"""What PEFT inserts between a module's name and its own parameters if it adapts the module, trains tokens of it, or
saves it whole. The last marks a second copy of a saved module: written if the vocabulary has changed, never read."""

Parameter = Literal["weight", "bias"]


# ---------------------------------------------------------------- trained tokens


def read_tokens(matcher: TensorMatcher, targeted: Mapping[str, SiteShape]) -> list[TrainedTokens]:
    """Return the separately trained rows of embeddings and head. targeted: the layers with LoRA."""
    if matcher.base is None:
        return []
    config, reasons, head, embedding = matcher.config, matcher.reasons, matcher.head, matcher.embedding
    chosen: dict[str, tuple[int, ...]] = {}
    for ending, indices in config.tokens.items():
        modules = [name for name in matcher.sites if name.endswith(ending)] if ending else [embedding]
        if not any(modules):
            reasons.add("trainable_token_indices names no module of the base model", ending or None)
        chosen |= {module: indices for module in modules if module}
    indices = chosen.get(embedding)
    tied_to = embedding if indices and matcher.is_tied and chosen.get(head, indices) == indices else ""
    if tied_to and indices:
        chosen[head] = indices
    found: list[TrainedTokens] = []
    for module, indices in chosen.items():
        is_tied = bool(tied_to) and module == head  # PEFT then trains the layer inside its LoRA
        if (module in targeted and not (is_tied and not config.use_dora)) or config.saved.saves(module):
            reasons.add("trained tokens of a module that is also adapted or saved whole", module)
        found.extend(_read_trained(matcher, module, indices, tied_to if module == head else ""))
    return found


def _read_trained(
    matcher: TensorMatcher, module: str, indices: tuple[int, ...], tied_to: str
) -> Iterator[TrainedTokens]:
    """Yield the trained rows of a module, or of the one it is tied to; nothing, with a reason, if they are invalid."""
    site, tensors = matcher.sites[module], matcher.tensors.tokens
    if site.kind == "embedding":
        width = site.out_features
    elif site.kind == "linear" and not site.has_bias:
        width = site.in_features
    else:
        matcher.reasons.add("trained tokens of this module are not served", module)
        return
    if tied_to and module in tensors:
        matcher.ignore(tensors[module])
    tensor = matcher.take(tensors.get(tied_to or module), module, "trainable_tokens_delta", (len(indices), width))
    if tensor:
        yield TrainedTokens(module, indices, tensor)


# ---------------------------------------------------------------- whole parameters


def read_replaced(
    matcher: TensorMatcher, targeted: Mapping[str, SiteShape], tokens: list[TrainedTokens]
) -> list[ReplacedWeights]:
    """Return the whole parameters in the file: `modules_to_save`, biases, saved base weights.

    Sets the matcher's vocabulary size if the embedding or head has another number of rows, and the number of labels if
    the label head is replaced.
    """
    saved, reasons = matcher.config.saved, matcher.reasons
    wrapped = {part.site: TOKENS_WRAPPED for part in tokens} | dict.fromkeys(targeted, WRAPPED)
    with_weight = matcher.tensors.with_weight()
    found: dict[tuple[str, str], ReplacedWeights] = {}
    loaded: dict[str, ReplacedWeights] = {}  # weights that PEFT loads into the base's own modules
    for site in matcher.sites.values():
        is_saved = saved.saves(site.name)
        if site.kind == OPAQUE and (is_saved or site.name in with_weight):
            reasons.add("whole weights of quantised layers are not served", site.name)
            continue
        for parameter in _parameters_of(site):
            own = _replacement(matcher, site, wrapped.get(site.name, ""), parameter)
            if own is not None:
                found[site.name, parameter] = own
            elif is_saved and matcher.base is not None:
                reasons.add("tensors missing for modules_to_save", f"{site.name}.{parameter}")
            original = _replacement(matcher, site, ORIGINAL, parameter) if is_saved else own
            if original is not None and parameter == "weight":
                loaded[site.name] = original
            if is_saved:
                _replacement(matcher, site, SAVED_TWICE, parameter)
    if matcher.is_tied:
        _tie(matcher, found, loaded)
    for name in matcher.base.missing if matcher.base is not None else ():
        if (name, "weight") not in found:
            reasons.add("the base model has no weights of this layer, and the adapter does not bring it", name)
    return list(found.values())


def _parameters_of(site: SiteShape) -> tuple[Parameter, ...]:
    """Return the parameters of a module that an adapter may replace."""
    if site.kind == "parameter":
        return ()
    return ("weight", "bias") if site.has_bias else ("weight",)


def _replacement(matcher: TensorMatcher, site: SiteShape, wrapper: str, parameter: Parameter) -> ReplacedWeights | None:
    """Return the parameter of a module that the file has under a wrapper's name, None if there is none."""
    name = matcher.tensors.plain.get((site.name, wrapper, parameter))
    if name is None or not matcher.take(name, site.name, parameter, _shape(matcher, site, parameter, name)):
        return None
    return ReplacedWeights(site.name, parameter, name)


def _tie(
    matcher: TensorMatcher, found: dict[tuple[str, str], ReplacedWeights], loaded: Mapping[str, ReplacedWeights]
) -> None:
    """Share the weight loaded into a tied embedding or head; a module saved whole keeps its own."""
    last = loaded.get(matcher.head) or loaded.get(matcher.embedding)  # PEFT loads the head's last
    if last is not None:
        for name in (matcher.embedding, matcher.head):
            if not matcher.config.saved.saves(name):
                found[name, "weight"] = replace(last, site=name)


def _shape(matcher: TensorMatcher, site: SiteShape, parameter: Parameter, name: str) -> tuple[int, ...]:
    """Return the required shape of a replaced parameter. The file decides the numbers of tokens and labels."""
    if site.name == matcher.label_head and matcher.base is not None and parameter == "weight":
        matcher.num_labels = _num_labels(matcher, name)
        return (matcher.num_labels, site.in_features)
    if parameter == "bias" or site.kind == "norm":
        num = matcher.size(site)[1] if parameter == "bias" and site.kind != "norm" else site.in_features
        return (num,)
    rows, width = site.in_features, site.out_features
    if site.name in (matcher.embedding, matcher.head) and matcher.base is not None:
        own = matcher.infos[name].shape[0]
        if not own:
            matcher.reasons.add("this embedding or head has no tokens", site.name)
        if matcher.vocab_size and own != matcher.vocab_size:
            sizes = f"{matcher.vocab_size} and {own}"
            matcher.reasons.add(f"embedding and head of {sizes} tokens do not fit together")
        if own != matcher.base.vocab_size:
            matcher.vocab_size = own
        rows, width = (own, width) if site.kind == "embedding" else (rows, own)
    return (width, rows) if site.kind == "linear" else (rows, width)


def _num_labels(matcher: TensorMatcher, name: str) -> int:
    """Return the number of labels of a head whose weight is a tensor of the file."""
    num = matcher.infos[name].shape[0] if matcher.infos[name].shape else 0
    if not 1 <= num <= MAX_LABELS:
        matcher.reasons.add(f"its head has {num} labels, where 1 to {MAX_LABELS} are served")
    return num


# ---------------------------------------------------------------- heads of sequence classifiers


def read_head(matcher: TensorMatcher) -> str:
    """Return the tensor of the head that makes a decoder a classifier, "" for none; sets the number of labels.

    The head is not among a decoder's sites, because the base may lack it.
    """
    base, plain = matcher.base, matcher.tensors.plain
    name = base.label_head if base is not None else ""
    weight = plain.get((name, "", "weight"))
    if base is None or not name or name in matcher.sites or weight is None:
        return ""
    for wrapper in (ORIGINAL, SAVED_TWICE):
        if (name, wrapper, "weight") in plain:
            matcher.ignore(plain[name, wrapper, "weight"])
    matcher.num_labels = _num_labels(matcher, weight)
    return matcher.take(weight, name, "weight", (matcher.num_labels, base.width))


# ---------------------------------------------------------------- vocabulary


def check_vocabulary(matcher: TensorMatcher, replaced: list[ReplacedWeights], tokens: list[TrainedTokens]) -> None:
    """Add reasons for token ids whose rows are neither in the base model nor in the file.

    Sets the matcher's vocabulary size if trained tokens extend it.
    """
    if matcher.base is None:
        return
    whole = {part.site for part in replaced if part.parameter == "weight"}
    sizes: dict[str, int] = {}
    for module in filter(None, (matcher.embedding, matcher.head)):
        size = matcher.vocab_size if matcher.vocab_size and module in whole else matcher.base.vocab_size
        new = sorted(i for part in tokens if part.site == module for i in part.indices if i >= size)
        if new != list(range(size, size + len(new))):
            matcher.reasons.add(f"token {new[-1]} is trained, but the rows before it are not in the file", module)
        sizes[module] = size + len(new)
    if len(set(sizes.values())) > 1:
        shown = " and ".join(map(str, sizes.values()))
        matcher.reasons.add(f"embedding and head would have {shown} tokens: save both, or train rows of both")
    elif sizes and matcher.embedding in sizes and sizes[matcher.embedding] != matcher.base.vocab_size:
        matcher.vocab_size = sizes[matcher.embedding]
    known = matcher.vocab_size or matcher.base.vocab_size
    if any(token >= known for token in matcher.config.invocation):
        matcher.reasons.add(f"alora_invocation_tokens holds ids outside 0 … {known - 1}")
