"""Reads an adapter under its own names: renames and cuts the base like the adapter's model, and maps the result back.

So every config field (patterns, layers, ranks by pattern) keeps its meaning from training, and none needs translation.
Pure: names and shapes in, a mapping or reasons out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from peft_adapters.names.fused import Cut, cut_sites, uncut
from peft_adapters.names.layouts import Layout, layout_of, rename
from peft_adapters.reasons import Reasons
from peft_adapters.spec import AdapterSpec
from protocol.wire.messages import ServedModel, SiteShape


@dataclass(frozen=True, slots=True)
class Translation:
    """A base model under an adapter's names, and the way back."""

    base: ServedModel  # with the adapter's names
    names: Mapping[str, str]  # the adapter's name of a module or parameter -> the base's, where they differ
    cuts: Sequence[Cut]  # with the adapter's names
    rules: Mapping[str, str]  # name patterns and what they were mapped to, for display

    def back(self, spec: AdapterSpec, order: Iterable[SiteShape], reasons: Reasons) -> AdapterSpec:
        """Return the adapter's changes under the base's own names. Adds reasons for changes that cannot be mapped.

        order: the base's own sites.
        """
        made = {cut.fused for cut in self.cuts if cut.is_fused}
        made |= {part.name for cut in self.cuts if not cut.is_fused for part in cut.parts}
        for part in (*spec.replaced, *spec.tokens):
            if part.site in made:
                reasons.add("whole weights of layers that the base model fuses or splits otherwise", part.site)
        places = {site.name: place for place, site in enumerate(order)}
        sites = [replace(lora, site=self._own(lora.site)) for lora in uncut(spec.sites, self.cuts, reasons)]
        return replace(
            spec,
            sites=tuple(sorted(sites, key=lambda lora: places.get(lora.site, 0))),
            embeddings=tuple(replace(part, site=self._own(part.site)) for part in spec.embeddings),
            parameters=tuple(replace(part, site=self._own(part.site)) for part in spec.parameters),
            operations=tuple(replace(part, site=self._own(part.site)) for part in spec.operations),
            replaced=tuple(replace(part, site=self._own(part.site)) for part in spec.replaced),
            tokens=tuple(replace(part, site=self._own(part.site)) for part in spec.tokens),
        )

    def _own(self, name: str) -> str:
        return self.names.get(name, name)


def translate(outputs: Mapping[str, int], modules: Iterable[str], base: ServedModel) -> Translation | None:
    """Return a base model under the names in an adapter's file; None if these are the base's own, or no mapping fits.

    outputs: modules with LoRA in the file, with the number of rows of B. modules: all modules with tensors in it.
    """
    sites = {site.name: site for site in base.sites}
    theirs = set(modules)
    if theirs <= sites.keys():
        return None
    names: dict[str, str] = {}
    rules: dict[str, str] = {}
    own, other = layout_of(sites), layout_of(theirs)
    if own is not None and other is not None and own != other:
        renamed = {name: new for name in sites if (new := rename(name, own, other)) is not None}
        names = {new: name for name, new in renamed.items()}
        sites = {new: msgspec.structs.replace(sites[name], name=new) for name, new in renamed.items()}
        rules = _layout_rules(own, other)
    sites, cuts = cut_sites(sites, outputs, base.model_type)
    if not rules and not cuts:
        return None
    rules |= _cut_rules(cuts)
    return Translation(msgspec.structs.replace(base, sites=list(sites.values())), names, cuts, rules)


def _layout_rules(own: Layout, other: Layout) -> dict[str, str]:
    rules = {other.inside("*"): own.inside("*")}
    if own.head != other.head:
        rules[other.head] = own.head
    return rules


def _cut_rules(cuts: Iterable[Cut]) -> dict[str, str]:
    rules: dict[str, str] = {}
    for cut in cuts:
        parts = ", ".join(f"*.{part.name.rpartition('.')[2]}" for part in cut.parts)
        fused = f"*.{cut.fused.rpartition('.')[2]}"
        rules |= {fused: parts} if cut.is_fused else {parts: fused}
    return rules
