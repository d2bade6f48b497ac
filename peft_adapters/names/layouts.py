"""The place of a model's decoder: text classes, multimodal wrappers and bare decoders name the same layers differently.

transformers 4.52 moved the decoders of its wrappers from `language_model.model` to `model.language_model`; text classes
have `model`, and `AutoModel` has no prefix. Adapters trained on any of these are mapped to bases of any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of a decoder and of the language model's head."""

    decoder: str  # "" for a model that is its own decoder
    head: str

    def rest_of(self, module: str) -> str | None:
        """Return a module's name inside the decoder, None if it is outside."""
        if not self.decoder:
            return module
        return module.removeprefix(f"{self.decoder}.") if module.startswith(f"{self.decoder}.") else None

    def inside(self, rest: str) -> str:
        """Return the full name of a module inside the decoder."""
        return f"{self.decoder}.{rest}" if self.decoder else rest


LAYOUTS = {
    layout.decoder: layout
    for layout in (
        Layout("model", "lm_head"),  # text classes
        Layout("model.language_model", "lm_head"),  # wrappers since 4.52: Qwen-VL, Gemma 3 and 4, Mistral 3, LLaVA
        Layout("language_model.model", "language_model.lm_head"),  # wrappers before, and Llama 4
        Layout("model.text_model", "lm_head"),  # Idefics, SmolVLM
        Layout("thinker.model", "thinker.lm_head"),  # Qwen Omni
        Layout("", "lm_head"),  # AutoModel of a text class
    )
}
"""The layouts by decoder name."""

_LAYER = re.compile(r"(?:(?P<decoder>.+?)\.)?layers\.\d+\..+", re.DOTALL)
_PARTS = ("embed_tokens", "norm")
"""Parts of a decoder outside its layers, which identify it if nothing in its layers is adapted."""


def layout_of(modules: Iterable[str]) -> Layout | None:
    """Return the layout of a model or file with these modules, None if it is unknown or ambiguous."""
    names = list(modules)
    found = {match["decoder"] or "" for name in names if (match := _LAYER.fullmatch(name))}
    if not found & LAYOUTS.keys():
        found = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in _PARTS}
    known = found & LAYOUTS.keys()
    return LAYOUTS[known.pop()] if len(known) == 1 else None


def rename(module: str, own: Layout, theirs: Layout) -> str | None:
    """Return the name of a module of one layout in another, None if the other has no such module.

    Other heads, such as a classifier's, have the same name in all layouts.
    """
    if module == own.head:
        return theirs.head
    rest = own.rest_of(module)
    if rest is not None and (own.decoder or "." in rest or rest in _PARTS):
        return theirs.inside(rest)
    return module if "." not in module else None
