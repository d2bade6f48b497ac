"""Reads the layers of an adapter that is not LoRA: the tensors that its kind has there, and the rows that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft_adapters.kinds.kind import MAX_KIND_NUMBERS, MAX_KIND_ROWS, Kind, Layer, Unfit
from peft_adapters.matching import TensorMatcher
from peft_adapters.spec import KindRows, LoraWeights
from protocol.wire.messages import OPAQUE, SiteShape

CONVERT = "convert it to LoRA: `lorafleet adapter convert SRC DST --base MODEL --rank auto`"
"""What to do about an adapter that has no form of few enough rows."""


def read_kind(matcher: TensorMatcher, kind: Kind, targeted: Mapping[str, SiteShape]) -> Iterator[LoraWeights]:
    """Yield what a kind adds to the targeted layers; nothing, with reasons, where anything is wrong.

    Nothing is made of the tensors here: what it would take is known from config and shapes, and refused where it is
    too much.
    """
    sizes = [matcher.size(site) for site in targeted.values()]
    widest = (max((rows for rows, _ in sizes), default=0), max((width for _, width in sizes), default=0))
    served = ("linear", "conv1d", OPAQUE) if kind.conv1d else ("linear", OPAQUE)
    num_numbers = 0
    for site in targeted.values():
        if site.kind not in served:
            matcher.reasons.add(f"{kind.name} is not served on modules of this kind", site.name)
            continue
        part = _read_layer(matcher, kind, site, widest)
        if part is not None:
            num_numbers += part.rank * sum(matcher.size(site))
            yield part
    if num_numbers > MAX_KIND_NUMBERS:
        matcher.reasons.add(
            f"{kind.name} makes {num_numbers} numbers of rank rows of this file, where {MAX_KIND_NUMBERS} are served; "
            f"{CONVERT}"
        )


def _read_layer(matcher: TensorMatcher, kind: Kind, site: SiteShape, widest: tuple[int, int]) -> LoraWeights | None:
    config, reasons, before = matcher.config, matcher.reasons, len(matcher.reasons)
    inputs, outputs = matcher.size(site)
    options = dict(config.options)
    for name, pattern in (("r", config.ranks), ("alpha", config.alphas)):
        if name in options:
            options[name] = pattern.get(site.name, options[name])
    try:
        rows = kind.rows(Layer(options, inputs, outputs, widest))
    except Unfit as unfit:
        reasons.add(f"{kind.name}: {unfit}", site.name)
        return None
    if rows.needs_weight and site.kind == OPAQUE:
        reasons.add(f"{kind.name} needs weights of the base model, which are quantised", site.name)
    if rows.rank > MAX_KIND_ROWS:
        reasons.add(f"{kind.name} makes {rows.rank} rank rows, where {MAX_KIND_ROWS} are served; {CONVERT}", site.name)
    tensors = {**matcher.tensors.shared, **matcher.tensors.of_kind.get(site.name, {})}
    taken = {
        name: matcher.take(tensors.get(name), site.name, name, shape, integers=name in rows.integers)
        for name, shape in rows.shapes.items()
    }
    if len(reasons) > before:
        return None
    return LoraWeights(
        site.name, rows.rank, rows.scale, "", "", width=outputs,
        of_kind=KindRows(kind.name, rows, taken),
    )  # fmt: skip
