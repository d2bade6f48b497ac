"""The cost limits of a grammar, as llguidance's `LLParserLimits` takes them: the same for checking and for running it.

Schemas of three hundred properties and choices among a thousand texts stay below the limits. Within them, a mask takes
at most 20 ms and a token at most 5 ms (AMD EPYC, 2026-11-26).
"""

from __future__ import annotations

from typing import TypedDict


class GrammarLimits(TypedDict):
    """The limits that the project sets; all others keep llguidance's defaults."""

    max_items_in_row: int  # parser items after one token
    step_max_items: int  # parser items of one mask
    step_lexer_fuel: int  # work of the lexer for one mask
    max_lexer_states: int  # lexer states of one request: tens of MB


GRAMMAR_LIMITS: GrammarLimits = {
    "max_items_in_row": 2_000,
    "step_max_items": 10_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
}
