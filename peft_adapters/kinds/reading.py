"""Reads the layers of an adapter that is not LoRA: the kind's tensors on each, and their form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from peft_adapters.config_fields import read_ids
from peft_adapters.kinds.kind import MAX_KIND_NUMBERS, MAX_KIND_PRODUCTS, MAX_KIND_ROWS, Kind, Layer, Operation, Unfit
from peft_adapters.kinds.refused import what_to_do
from peft_adapters.matching import TensorMatcher
from peft_adapters.replaced import Parameter
from peft_adapters.spec import KindRows, LayerOperation, LoraWeights, ReplacedWeights
from protocol.wire.messages import OPAQUE, SiteShape

_TOKENS = "trainable_tokens_delta"


@dataclass(slots=True)
class KindParts:
    """An adapter's changes, by form."""

    sites: list[LoraWeights] = field(default_factory=list[LoraWeights])
    operations: list[LayerOperation] = field(default_factory=list[LayerOperation])
    replaced: list[ReplacedWeights] = field(default_factory=list[ReplacedWeights])
    num_numbers: int = 0  # numbers computed from the file
    num_products: int = 0  # multiplications for that


def read_kind(matcher: TensorMatcher, kind: Kind, targeted: Mapping[str, SiteShape]) -> KindParts:
    """Return a kind's changes of the targeted layers; incomplete, with reasons, if anything is wrong.

    Tensors are not processed here: the cost of that is known from config and shapes, and refused if excessive.
    """
    sizes = [matcher.size(site) for site in targeted.values()]
    widest = (max((rows for rows, _ in sizes), default=0), max((width for _, width in sizes), default=0))
    layers = ("linear", "conv1d", OPAQUE) if kind.conv1d else ("linear", OPAQUE)
    served = ("norm",) if kind.changes == "norms" else layers
    found = KindParts()
    for number, site in enumerate(targeted.values()):
        if site.kind not in served:
            matcher.reasons.add(f"{kind.name} is not served on modules of this kind", site.name)
        elif kind.changes == "norms":
            found.replaced += _read_norm(matcher, site)
        else:
            layer = Layer(site.name, {}, *matcher.size(site), widest, site.has_bias, (number, len(targeted)))
            _read_layer(matcher, kind, site, layer, found)
    if found.num_numbers > MAX_KIND_NUMBERS:
        limit = f"where {MAX_KIND_NUMBERS} are served{what_to_do(kind.name)}"
        matcher.reasons.add(f"{kind.name} makes {found.num_numbers} numbers of this file, {limit}")
    if found.num_products > MAX_KIND_PRODUCTS:
        limit = f"where {MAX_KIND_PRODUCTS} are served"
        matcher.reasons.add(f"{kind.name} takes {found.num_products} multiplications to load, {limit}")
    return found


def take_tokens(matcher: TensorMatcher, targeted: Mapping[str, SiteShape]) -> None:
    """Rewrite trainable tokens in LoRA's form: the targeted modules' tokens and tensors."""
    indices = read_ids("token_indices", matcher.config.options["token_indices"], matcher.reasons)
    matcher.config = replace(matcher.config, tokens=dict.fromkeys(targeted, indices))
    matcher.tensors.tokens |= {module: own[_TOKENS] for module, own in matcher.tensors.of_kind.items()}
    matcher.tensors.of_kind = {}


def _read_norm(matcher: TensorMatcher, site: SiteShape) -> Iterator[ReplacedWeights]:
    own = matcher.tensors.of_kind.get(site.name, {})
    parameters: tuple[Parameter, ...] = ("weight", "bias") if site.has_bias else ("weight",)
    for parameter in parameters:
        name = f"ln_tuning_layers.{parameter}"
        if taken := matcher.take(own.get(name), site.name, name, (site.in_features,)):
            yield ReplacedWeights(site.name, parameter, taken)


def _read_layer(matcher: TensorMatcher, kind: Kind, site: SiteShape, layer: Layer, found: KindParts) -> None:
    """Add a kind's change of one layer to `found`, with its costs; adds reasons if anything is wrong."""
    config, reasons, before = matcher.config, matcher.reasons, len(matcher.reasons)
    inputs, outputs = layer.in_features, layer.out_features
    options = dict(config.options)
    for name, pattern in (("r", config.ranks), ("alpha", config.alphas)):
        if name in options:
            options[name] = pattern.get(site.name, options[name])
    try:
        form = kind.form(replace(layer, options=options))
    except Unfit as unfit:
        reasons.add(f"{kind.name}: {unfit}", site.name)
        return
    found.num_products += form.num_products
    mine, shared = matcher.tensors.of_kind.get(site.name, {}), matcher.tensors.shared
    taken = {
        name: matcher.take(mine.get(name) or shared.get(name), site.name, name, shape, integers=name in form.integers)
        for name, shape in form.shapes.items()
    }
    if isinstance(form, Operation):
        found.num_numbers += form.num_numbers
        if len(reasons) == before:
            found.operations.append(LayerOperation(site.name, kind.name, form, taken))
        return
    found.num_numbers += max(form.rank * (inputs + outputs), form.num_added)
    if form.needs_weight and site.kind == OPAQUE:
        reasons.add(f"{kind.name} needs weights of the base model, which are quantised", site.name)
    if form.rank > MAX_KIND_ROWS:
        limit = f"where {MAX_KIND_ROWS} are served{what_to_do(kind.name)}"
        reasons.add(f"{kind.name} makes {form.rank} rank rows, {limit}", site.name)
    if len(reasons) == before:
        rows = KindRows(kind.name, form, taken)
        found.sites.append(LoraWeights(site.name, form.rank, form.scale, "", "", width=outputs, of_kind=rows))
