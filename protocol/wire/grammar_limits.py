"""What a grammar may cost, as llguidance's `LLParserLimits` takes it: the same where it is checked and where it runs.

Schemas of three hundred properties and choices of a thousand texts stay below. A mask takes 20 ms at most then, and a
token 5 ms (AMD EPYC, 2026-11-26).
"""

from __future__ import annotations

from typing import TypedDict


class GrammarLimits(TypedDict):
    """The limits that are set; others are llguidance's."""

    max_items_in_row: int  # parser items after one token
    step_max_items: int  # parser items of one mask
    step_lexer_fuel: int  # work of the lexer for one mask
    max_lexer_states: int  # per request: tens of MB


GRAMMAR_LIMITS: GrammarLimits = {
    "max_items_in_row": 2_000,
    "step_max_items": 10_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
}
