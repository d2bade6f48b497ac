"""Projections that one model computes as one layer and another as several: `qkv_proj`, `gate_up_proj`.

The rows of a fused layer are its parts' rows in sequence. So LoRA of the fused layer is, on each part, the same A with
the part's rows of B. LoRA of the parts is, on the fused layer, their A stacked and their B as diagonal blocks, with the
sum of their ranks. LoRA biases and DoRA magnitudes have one number per row and are split and joined like rows: the norm
of a weight's row is the same in both forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from peft_adapters.reasons import Reasons
from peft_adapters.spec import LoraBlock, LoraWeights
from protocol.wire.messages import SiteShape

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused layers by name, with their parts in row order."""

_FAMILIES = {
    "qkv_proj": ("phi3", "phi4_multimodal"),
    "gate_up_proj": ("phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "glm4v_text", "glm_ocr", "glm_ocr_text"),
}
"""Model types whose fused layers have this row order. Others interleave rows by head, or differ in meaning."""


@dataclass(frozen=True, slots=True)
class FusedPart:
    """A part of a fused layer: rows [begin, end) of its output."""

    name: str  # name of the module
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Layers of the base that the adapter has fused or split."""

    is_fused: bool  # True: the adapter has them fused
    fused: str  # name of the fused module
    parts: tuple[FusedPart, ...]


def cut_sites(
    sites: Mapping[str, SiteShape], outputs: Mapping[str, int], model_type: str
) -> tuple[dict[str, SiteShape], list[Cut]]:
    """Return a base's sites by name, fused and split as in an adapter, and the cuts that were made.

    outputs: modules with LoRA in the adapter's file, with the number of rows of B.
    """
    found, cuts = dict(sites), list[Cut]()
    for fused, parts in FUSED.items():
        own = {name for name in outputs if name.rpartition(".")[2] in (fused, *parts)}
        if not own or own <= sites.keys():
            continue
        parents = [name.rpartition(".")[0] for name in sites if name.rpartition(".")[2] in (fused, parts[0])]
        # Same for the whole model, so that a layer without tensors is reported missing under the adapter's name.
        if {name.rpartition(".")[2] for name in own} == {fused}:
            made = [_fuse(found, parent, fused, parts) for parent in parents]
        elif model_type in _FAMILIES[fused] and not any(name.endswith(f".{fused}") for name in own):
            made = [_split(found, parent, fused, parts, _widths(found, outputs, fused, parts)) for parent in parents]
        else:
            continue
        cuts += [cut for cut in made if cut is not None]
    return found, cuts


def _fuse(found: dict[str, SiteShape], parent: str, fused: str, parts: tuple[str, ...]) -> Cut | None:
    """Replace a parent's parts with a fused site; return None if it lacks any of them as a linear layer."""
    own = [found.get(f"{parent}.{part}") for part in parts]
    sites = [site for site in own if site is not None and site.kind == "linear"]
    if len(sites) < len(parts) or len({site.in_features for site in sites}) > 1:
        return None
    begin, rows = 0, list[FusedPart]()
    for site in sites:
        del found[site.name]
        rows.append(FusedPart(site.name, begin, begin := begin + site.out_features))
    name = f"{parent}.{fused}"
    found[name] = SiteShape(name, sites[0].in_features, begin)
    return Cut(is_fused=True, fused=name, parts=tuple(rows))


def _split(
    found: dict[str, SiteShape], parent: str, fused: str, parts: tuple[str, ...], widths: Mapping[int, list[int]]
) -> Cut | None:
    """Replace a parent's fused layer with sites for its parts; return None if their sizes are unknown."""
    site = found.get(f"{parent}.{fused}")
    sizes = widths.get(site.out_features) if site is not None else None
    if site is None or sizes is None or site.kind != "linear":
        return None
    del found[site.name]
    begin, rows = 0, list[FusedPart]()
    for part, size in zip(parts, sizes, strict=True):
        name = f"{parent}.{part}"
        found[name] = SiteShape(name, site.in_features, size)
        rows.append(FusedPart(name, begin, begin := begin + size))
    return Cut(is_fused=False, fused=site.name, parts=tuple(rows))


def _widths(
    sites: Mapping[str, SiteShape], outputs: Mapping[str, int], fused: str, parts: tuple[str, ...]
) -> dict[int, list[int]]:
    """Return the rows of each part, by the rows of the fused layer.

    gate and up have half each. k and v have equally many rows, so any of the file's parts determines all.
    """
    found: dict[int, list[int]] = {}
    for name, site in sites.items():
        parent, _, leaf = name.rpartition(".")
        if leaf != fused or site.out_features in found:
            continue
        total = site.out_features
        if len(parts) == 2:
            found[total] = [total // 2, total - total // 2]
            continue
        q, k, v = (outputs.get(f"{parent}.{part}", 0) for part in parts)
        kv = k or v or (total - q) // 2
        if (q or k or v) and 0 < 2 * kv < total:
            found[total] = [total - 2 * kv, kv, kv]
    return found


def uncut(lora: Iterable[LoraWeights], cuts: Sequence[Cut], reasons: Reasons) -> list[LoraWeights]:
    """Return an adapter's LoRA on the base's own layers. Adds reasons for LoRA that cannot be split or joined."""
    parts = {part.name: (cut, part) for cut in cuts if not cut.is_fused for part in cut.parts}
    whole = {cut.fused: cut for cut in cuts if cut.is_fused}
    found: list[LoraWeights] = []
    grouped: dict[str, list[tuple[FusedPart, LoraWeights]]] = {}
    for own in lora:
        if own.site not in parts and own.site not in whole:
            found.append(own)
        elif own.singular:
            reasons.add("AdaLoRA is not served on layers that the base model fuses or splits otherwise", own.site)
        elif own.site in whole:
            found += [
                replace(
                    own,
                    site=part.name,
                    a="",
                    b="",
                    blocks=(LoraBlock(own.a, own.b, part.begin, part.end, bias=own.bias, magnitude=own.magnitude),),
                    width=part.end - part.begin,
                )
                for part in whole[own.site].parts
            ]
        else:
            cut, part = parts[own.site]
            grouped.setdefault(cut.fused, []).append((part, own))
    return found + [_join(cut, grouped[cut.fused]) for cut in cuts if cut.fused in grouped]


def _join(cut: Cut, own: list[tuple[FusedPart, LoraWeights]]) -> LoraWeights:
    """Return one LoRA for a fused layer, with the first part's scale; factors on the others' B compensate."""
    scale = next((lora.scale for _, lora in own if lora.scale), 0.0)
    blocks = tuple(
        LoraBlock(
            lora.a, lora.b, 0, part.end - part.begin, part.begin, lora.scale / scale if scale else 1.0, lora.bias,
            lora.magnitude,
        )
        for part, lora in own
    )  # fmt: skip
    first = own[0][1]
    return LoraWeights(
        cut.fused, sum(lora.rank for _, lora in own), scale, "", "", bias=first.bias, magnitude=first.magnitude,
        blocks=blocks, width=cut.parts[-1].end,
    )  # fmt: skip
