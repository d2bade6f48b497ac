"""Forward passes of one sequence at a time, and the transformers caches kept between them.

A model's forward returns its cache or state under the name by which the next pass accepts it. Some models fill a cache
object passed to them without returning it. Some modules keep tensors in their own attributes, which are restored before
a sequence's next pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from gpu_worker.loading.checkpoint import CACHE_NAMES
from gpu_worker.one_by_one.account import Account, Continues


@dataclass(slots=True)
class Kept:
    """The cache of one sequence."""

    end: int = 0  # number of its tokens that are computed
    results: dict[str, Any] = field(default_factory=dict[str, Any])  # results of its last pass that the next pass takes
    attributes: list[Tensor | None] = field(default_factory=list[Tensor | None])  # modules' attributes, see `Passes`
    logits: Tensor | None = None  # of its last token, if they may be needed again

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in it, in bytes, shared storage counted once."""
        found = {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors([self.results, self.attributes])}
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


class Passes:
    """Runs one model's passes of single sequences."""

    def __init__(self, module: PreTrainedModel, *, keeps_logits: bool) -> None:
        """keeps_logits: whether the module's forward takes logits_to_keep."""
        self.module = module
        self.continues: Continues = "chunks"
        self.account = Account(0, 0)
        self._keeps_logits = keeps_logits
        self._names = set(inspect.signature(module.forward).parameters)
        self._attributes: list[tuple[nn.Module, str]] = []
        self._given = ""  # argument name of a cache that passes do not return; "": none

    def run(self, kept: Kept | None, ids: Tensor, rows: Tensor) -> tuple[Tensor, Kept]:
        """Compute a sequence's next tokens, int64 [n].

        Return the logits [m, V] of `rows`, int64 [m], and the new cache. kept: the cache before them, None at a text's
        beginning. Raises ValueError for a model without logits per token.
        """
        kept = kept or self._begin()
        inputs: dict[str, Any] = {"input_ids": ids[None], "use_cache": self.continues != "nothing", **kept.results}
        if "position_ids" in self._names:
            inputs["position_ids"] = torch.arange(kept.end, kept.end + len(ids), device=ids.device)[None]
        if self._keeps_logits:
            inputs["logits_to_keep"] = rows
        self._put(kept.attributes)
        out = self.module(**inputs)
        attributes = [vars(part)[name] for part, name in self._attributes]
        self._put([None] * len(attributes))  # so that nothing of an ended sequence is kept
        num_rows = len(rows) if self._keeps_logits else len(ids)
        if out.logits.shape[:2] != (1, num_rows):
            raise ValueError(f"logits of shape {tuple(out.logits.shape)} for {num_rows} tokens")
        logits = out.logits[0] if self._keeps_logits else out.logits[0, rows]
        if self.continues == "nothing":
            return logits, Kept()
        results = {name: value for name, value in out.items() if name in self._names}
        if self._given:
            results[self._given] = kept.results[self._given]
        return logits, Kept(kept.end + len(ids), results, attributes)

    def learn(self, run: Callable[[], Kept]) -> None:
        """Find out where the model stores its caches.

        run: runs a pass from a text's beginning, and returns its caches.
        """
        if not run().results:
            self._given = next((name for name in CACHE_NAMES if name in self._names), "")
        run()
        first = self._tensors()
        run()
        second = self._tensors()
        self._attributes = [key for key, tensor in second.items() if key in first and first[key] is not tensor]

    def _begin(self) -> Kept:
        """Return an empty cache."""
        cache = {self._given: DynamicCache(config=self.module.config.get_text_config())} if self._given else {}
        return Kept(results=cache, attributes=[None] * len(self._attributes))

    def _tensors(self) -> dict[tuple[nn.Module, str], Tensor]:
        """Return the tensors that are attributes of modules, but not parameters or buffers."""
        found = ((part, name, value) for part in self.module.modules() for name, value in vars(part).items())
        return {(part, name): value for part, name, value in found if isinstance(value, Tensor)}

    def _put(self, values: list[Tensor | None]) -> None:
        for (part, name), value in zip(self._attributes, values, strict=True):
            vars(part)[name] = value


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield all tensors in lists, dicts and objects, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (type, nn.Module)):
        seen.add(id(value))
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
        for part in vars(value).values() if parts is None and hasattr(value, "__dict__") else parts or ():
            yield from _tensors(part, seen)
