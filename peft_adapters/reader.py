"""Combines config, tensors and base model into what PEFT would make of an adapter. See `format.read_adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peft_adapters import experts
from peft_adapters.config import ADALORA, AdapterConfig
from peft_adapters.kinds.kind import Kind
from peft_adapters.kinds.reading import KindParts, read_kind, take_tokens
from peft_adapters.lora import read_lora, read_parameters
from peft_adapters.matching import LINEAR, TensorMatcher
from peft_adapters.reasons import Reasons
from peft_adapters.replaced import check_vocabulary, read_head, read_replaced, read_tokens
from peft_adapters.safetensors_header import TensorInfo
from peft_adapters.spec import AdapterSpec, LoraWeights
from peft_adapters.targets import NameTargets, endings_of
from peft_adapters.tensors import AdapterTensors
from protocol.wire.messages import OPAQUE, ServedModel, SiteShape


def read_spec(
    config: AdapterConfig,
    tensors: AdapterTensors,
    infos: Mapping[str, TensorInfo],
    base: ServedModel | None,
    reasons: Reasons,
) -> AdapterSpec:
    """Return an adapter's changes; meaningless if reasons were added.

    tensors, infos: the file's tensors by role, and by name. base: None to check without a model.
    """
    matcher = TensorMatcher(config, tensors, infos, base, reasons)
    own = config.own
    if own is None:
        _convert_old_names(matcher)
    elif base is None:
        return AdapterSpec(())  # tensors of other kinds do not show the layers' sizes
    targeted = _targeted(matcher)
    parameters = _targeted_parameters(matcher, targeted)
    if not targeted and not parameters:
        reasons.add("target_modules matches no layer of the base model")
    if own is not None and own.changes == "tokens":
        take_tokens(matcher, targeted)
        targeted = {}
    # Before LoRA: a replaced embedding or head decides the vocabulary, and with it the shapes of LoRA there.
    tokens = read_tokens(matcher, targeted)
    replaced = read_replaced(matcher, targeted, tokens)
    sites: list[LoraWeights] = []
    embeddings: list[LoraWeights] = []
    parts = read_kind(matcher, own, targeted) if own is not None else KindParts()
    for site in targeted.values() if own is None else ():
        (embeddings if site.kind == "embedding" else sites).extend(read_lora(matcher, site))
    wrapped = [lora for module, names in parameters.items() for lora in read_parameters(matcher, module, names)]
    head = read_head(matcher)
    idle = [lora for site in _idle(matcher) for lora in read_lora(matcher, site)]
    matcher.check_unused()
    check_vocabulary(matcher, replaced, tokens)
    return AdapterSpec(
        sites=(*parts.sites, *sites, *(lora for lora in wrapped if matcher.sites[lora.site].kind in LINEAR)),
        embeddings=tuple(embeddings),
        parameters=tuple(lora for lora in wrapped if matcher.sites[lora.site].kind not in LINEAR),
        operations=tuple(parts.operations),
        idle=tuple(idle),
        replaced=(*replaced, *parts.replaced),
        tokens=tuple(tokens),
        invocation=matcher.config.invocation,
        vocab_size=matcher.vocab_size,
        unscaled=_unscaled(own, parts),
        head=head,
        num_labels=matcher.num_labels,
    )


def read_whole_modules(
    config: AdapterConfig,
    tensors: AdapterTensors,
    infos: Mapping[str, TensorInfo],
    base: ServedModel | None,
    reasons: Reasons,
) -> AdapterSpec:
    """Return the changes of an adapter with only whole saved modules, like `read_spec`.

    In a decoder only a classifier's head is supported: any other module would affect more than its own tokens. PEFT
    embeds the text after virtual tokens with the base's own embedding, even if another is saved.
    """
    matcher = TensorMatcher(config, tensors, infos, base, reasons)
    replaced, head = read_replaced(matcher, {}, []), read_head(matcher)
    matcher.check_unused()
    check_vocabulary(matcher, replaced, [])
    if any(part.site == matcher.embedding for part in replaced):
        text = "whole modules beside virtual tokens are not served, but for what PEFT runs behind the embedding"
        reasons.add(text, matcher.embedding)
    if base is not None and base.label_head not in matcher.sites:  # a decoder
        for part in replaced:
            reasons.add("whole modules beside virtual tokens are not served, but for the head", part.site)
        if not head:
            reasons.add("the adapter does not bring the head that makes a classifier of the model", base.label_head)
    return AdapterSpec(
        (), replaced=tuple(replaced), vocab_size=matcher.vocab_size, head=head, num_labels=matcher.num_labels
    )


def _unscaled(own: Kind | None, parts: KindParts) -> str:
    """Return the name of a kind that PEFT cannot scale; "" for LoRA, and for kinds that add to weights."""
    if own is None or (own.changes == "layers" and all(part.operation.has_scale for part in parts.operations)):
        return ""
    return own.name


def _convert_old_names(matcher: TensorMatcher) -> None:
    """Rename experts that transformers 4 had as layers to today's names, as PEFT does."""
    old = experts.FAMILIES.get(matcher.base.model_type) if matcher.base else None
    if old is None:
        return
    converted = experts.convert(matcher.config, old, matcher.sites, matcher.tensors.lora, matcher.reasons)
    if converted is not None:
        matcher.config, matcher.old_names = converted, old
        matcher.tensors.lora = experts.rename(matcher.tensors.lora, old)


def _targeted(matcher: TensorMatcher) -> dict[str, SiteShape]:
    """Return the layers that the config targets, by name."""
    config, targets, sites = matcher.config, matcher.config.targets, matcher.sites
    if config.all_linear:
        linear = [site.name for site in sites.values() if site.kind in LINEAR and site.name != matcher.head]
        targets = replace(targets, targets=NameTargets(frozenset(linear)))
    found = {
        site.name: site
        for site in sites.values()
        if site.kind != "parameter" and targets.chosen(site.name) and not config.saved.excludes(site.name)
    }
    if config.tie and matcher.is_tied and matcher.embedding in found:
        found[matcher.head] = sites[matcher.head]
    for site in found.values():
        _check_target(config, site, matcher.reasons)
    return found


def _idle(matcher: TensorMatcher) -> list[SiteShape]:
    """Return the targeted layers with LoRA in the file that the base has but does not run on every token.

    PEFT wraps them too, but their output is unused. A kind that numbers its layers counts them, so for such a kind a
    reason is added and the result is empty.
    """
    config, own = matcher.config, matcher.config.own
    if matcher.base is None or (own is not None and not own.numbered):
        return []
    meant = [site for site in matcher.base.idle if config.all_linear or config.targets.chosen(site.name)]
    found = [site for site in meant if own is not None or site.name in matcher.tensors.lora]
    found = [site for site in found if not config.saved.excludes(site.name)]
    if own is None:
        return found
    for site in found:
        matcher.reasons.add(f"{own.name} is not served where it counts layers that the model does not run", site.name)
    return []


def _check_target(config: AdapterConfig, site: SiteShape, reasons: Reasons) -> None:
    """Add reasons against LoRA on a layer of this kind."""
    if config.own is not None:
        return  # see `read_kind`
    if site.kind == "norm":
        reasons.add("PEFT cannot adapt modules of this kind", site.name)
    elif site.kind == OPAQUE and config.use_dora:
        reasons.add("DoRA is not served on quantised layers", site.name)
    elif site.kind == "embedding":
        variants = {
            "lora_bias": config.lora_bias,
            "alora_invocation_tokens": bool(config.invocation),
            "AdaLoRA": config.kind == ADALORA,
        }
        for name, is_on in variants.items():
            if is_on:
                reasons.add(f"PEFT does not combine {name} with embeddings", site.name)


def _targeted_parameters(matcher: TensorMatcher, targeted: Mapping[str, SiteShape]) -> dict[str, list[str]]:
    """Return the parameters that `target_parameters` selects, by module, in the model's order."""
    found: dict[str, list[str]] = {}
    ends = frozenset(matcher.config.parameters)
    if not ends:
        return found
    for site in matcher.sites.values():
        if site.kind == "parameter":
            names = [site.name]
        else:
            names = [f"{site.name}.weight", *([f"{site.name}.bias"] if site.has_bias else [])]
        for name in names:
            if ends.isdisjoint(endings_of(name)):
                continue
            if name.endswith(".bias") or site.kind not in ("parameter", "linear"):
                matcher.reasons.add("LoRA on this parameter is not served", name)
            if site.name in targeted:
                matcher.reasons.add("PEFT cannot adapt a layer and its parameter", name)
            module, _, parameter = name.rpartition(".")
            found.setdefault(module, []).append(parameter)
    return found
