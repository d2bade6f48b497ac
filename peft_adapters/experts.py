"""Experts in adapters saved under transformers 4, where each expert was a module of linear layers.

They are read as LoRA on today's fused parameters, as PEFT 0.21 converts them
(`peft.utils.transformers_weight_conversion`): the config's old names become parameters, with twice the rank where two
layers were fused, and each expert keeps its own matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from peft_adapters.config import AdapterConfig
from peft_adapters.reasons import Reasons
from peft_adapters.targets import BadPattern, NameTargets, PatternMap, Targets
from protocol.wire.messages import SiteShape


@dataclass(frozen=True, slots=True)
class OldNames:
    """The former names of a model family's expert layers."""

    router: str
    fused: tuple[str, str]  # layers that are rows of gate_up_proj today, in this order
    down: str
    renamed: tuple[str, str] = ("", "")  # part of a module's former name, and its replacement today

    @property
    def parameters(self) -> dict[str, str]:
        """Former layer names -> end of the name of the parameter that holds the layer today."""
        first, second = self.fused
        return {self.router: ROUTER, first: GATE_UP, second: GATE_UP, self.down: DOWN}

    def layers_of(self, parameter: str) -> tuple[str, ...]:
        """Return the former layers of one expert that a parameter holds today."""
        return {GATE_UP: self.fused, DOWN: (self.down,)}.get(parameter, ())

    def module(self, name: str) -> str:
        """Return a module's name today."""
        old, new = self.renamed
        return name.replace(old, new) if old else name

    def old_module(self, name: str) -> str:
        """Return a module's former name."""
        old, new = self.renamed
        return name.replace(new, old) if new else name


GATE_UP, DOWN, ROUTER = "gate_up_proj", "down_proj", "gate.weight"
_OLD = re.compile(r"\.experts\.\d+\.")

_MIXTRAL = OldNames("gate", ("w1", "w3"), "w2", (".block_sparse_moe.", ".mlp."))
_QWEN2_MOE = OldNames("gate", ("gate_proj", "up_proj"), "down_proj")

_LIKE_MIXTRAL = ("minimax", "minimax_m2", "mixtral")
_LIKE_QWEN2_MOE = (
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
)  # fmt: skip

FAMILIES: dict[str, OldNames] = {
    **dict.fromkeys(_LIKE_MIXTRAL, _MIXTRAL),
    **dict.fromkeys(_LIKE_QWEN2_MOE, _QWEN2_MOE),
}
"""The former names, by model type."""


def convert(
    config: AdapterConfig, names: OldNames, sites: Mapping[str, SiteShape], in_file: Iterable[str], reasons: Reasons
) -> AdapterConfig | None:
    """Return a config with parameters in place of former layer names; None if it has no such names.

    sites: the base's, by name. in_file: modules with LoRA in the file. Adds reasons for what PEFT does not convert.
    PEFT does not convert patterns at all; if the file has former names, a pattern is read as the list of its matches.
    """
    if config.all_linear:
        reasons.add("all-linear is not served where PEFT takes experts for linear layers: list the layers")
        return None
    targets = config.targets.targets
    if targets.pattern is not None:
        listed = _listed(config.targets, names, sites) if any(_OLD.search(name) for name in in_file) else None
        if listed is None:
            _check_pattern(targets, names, sites, reasons)
            return None
        config, targets = replace(config, targets=Targets(listed, None, config.targets.layers)), listed
    old = {target: new for target in targets.endings if (new := names.parameters.get(target.rpartition(".")[2]))}
    if not old:
        return None
    used = {target.rpartition(".")[2] for target in old}
    if used & set(names.fused) not in (set(), set(names.fused)):
        reasons.add(f"PEFT cannot convert experts of which only one of {' and '.join(names.fused)} is adapted")
    elif used & set(names.fused) and names.down not in used:
        # PEFT looks for the fused layers among those of `down`.
        reasons.add(f"PEFT 0.21 loses what is adapted of {' and '.join(names.fused)} where {names.down} is not")
    ranks, alphas = dict(config.ranks.numbers), dict(config.alphas.numbers)
    if used >= set(names.fused):
        ranks[rf".*\.{GATE_UP}"], alphas[rf".*\.{GATE_UP}"] = 2 * config.r, 2 * config.alpha
    try:
        patterns = PatternMap(ranks), PatternMap(alphas)
    except BadPattern as error:
        reasons.add(f"rank_pattern or alpha_pattern, with what PEFT adds for experts: {error}")
        return None
    return replace(
        config,
        targets=replace(config.targets, targets=NameTargets(targets.endings - old.keys())),
        parameters=tuple(sorted({*config.parameters, *old.values()})),
        ranks=patterns[0],
        alphas=patterns[1],
    )


def _listed(targets: Targets, names: OldNames, sites: Mapping[str, SiteShape]) -> NameTargets | None:
    """Return the layers that a pattern matches under former names, as a list.

    None if no list is equivalent: the pattern matches some experts but not others, or other layers named like theirs.
    """
    whole: set[str] = set()
    experts: dict[str, bool] = {}  # former name of an expert layer -> whether the pattern matches it
    for site in sites.values():
        old = list(_old_layers(site, names))
        for layer in old:
            leaf, chosen = layer.rpartition(".")[2], targets.chosen(layer)
            if experts.setdefault(leaf, chosen) != chosen:
                return None
        if not old and site.kind != "parameter" and targets.chosen(site.name):
            whole.add(site.name)
    if any(name.rpartition(".")[2] in names.parameters for name in whole):
        return None
    return NameTargets(frozenset(whole | {leaf for leaf, chosen in experts.items() if chosen}))


def _old_layers(site: SiteShape, names: OldNames) -> Iterator[str]:
    """Yield the former names of the layers that a parameter replaced; nothing for any other site."""
    if site.kind != "parameter":
        return
    parent, _, leaf = site.name.rpartition(".")
    for old in names.layers_of(leaf):
        yield from (f"{names.old_module(parent)}.{expert}.{old}" for expert in range(site.num_experts))
    if site.name.endswith(f".{ROUTER}"):
        yield f"{names.old_module(parent).rpartition('.')[0]}.{names.router}"


def _check_pattern(targets: NameTargets, names: OldNames, modules: Iterable[str], reasons: Reasons) -> None:
    """Add a reason against a pattern that matches layers that PEFT would take for experts."""
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        meant = [leaf] if leaf in names.parameters else names.layers_of(leaf)
        if any(targets.chosen(f"{parent}.{name}") for name in meant):
            reasons.add("PEFT takes these for experts when target_modules is a pattern: list the layers", module)


def rename(tensors: Mapping[str, dict[str, str]], names: OldNames) -> dict[str, dict[str, str]]:
    """Return tensors by their modules' names today."""
    return {names.module(module): own for module, own in tensors.items()}
