"""EBNF in the dialect of other servers is converted to the equivalent Lark grammar."""

from __future__ import annotations

import pytest

from gateway.grammars.ebnf import is_ebnf, lark_of
from protocol.wire.errors import BadRequest


@pytest.mark.parametrize(
    ("ebnf", "lark"),
    [
        ('root ::= "yes" | "no"', 'start: "yes" | "no"'),
        ('root ::= ws num{2,3} # why\nws ::= [ \\t]*\nnum ::= [^a/[]+ | .',
         "start: rule_1 rule_2{2,3} \nrule_1: /[ \\t]/* \nrule_2: /[^a\\/\\[]/+ | /./"),
        ('root ::= (\n  "a"\n  | a-b )\na-b ::= "\\x41\\"\\n\\u00e9"', 'start: ( "a" | rule_1 ) \nrule_1: "A\\"\\né"'),
    ],
)  # fmt: skip
def test_ebnf_becomes_lark(ebnf: str, lark: str) -> None:
    assert is_ebnf(ebnf)
    assert lark_of(ebnf, "ebnf") == lark
    assert not is_ebnf(lark)


@pytest.mark.parametrize(
    ("ebnf", "message"),
    [
        ("root ::= x", "has no rule x"),
        ('x ::= "a"', "has no rule root"),
        ('root ::= "a"\nroot ::= "b"', "defines the rule root twice"),
        ('root ::= ::= "a"', "is not valid EBNF at"),
        ('root ::= "a', "is not valid EBNF at"),
        ('root ::= "\\q"', "invalid escape"),
        ("root ::= " + "a " * 20_000, "more than 10000 parts"),
    ],
)
def test_what_is_wrong_in_ebnf_is_told(ebnf: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        lark_of(ebnf, "ebnf")
