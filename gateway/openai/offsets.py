"""The `text_offset` of completions: where tokens begin in a choice's text, in characters. Pure.

A token that adds no text has the offset of the next one; so has each byte token of a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from protocol.wire.tokens import Detokenizer, TokenTable


class TextOffsets:
    """Computes the offsets of one choice, incrementally."""

    def __init__(self, tokens: TokenTable, echo: str) -> None:
        """echo: the beginning of the choice's text."""
        self._tokens = tokens
        self._echo = echo
        self._at = len(echo)
        self._output = Detokenizer(tokens)

    def of_prompt(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield the offsets of the prompt's tokens."""
        tokens, echo = self._tokens, self._echo
        # Without special tokens both ways agree, and the prompt need not be decoded.
        is_of_ids = tokens.special.isdisjoint(ids) or tokens.decode(ids, special=True) == echo
        detokenizer = Detokenizer(tokens, special=is_of_ids)
        at = 0
        for id_ in ids:
            yield min(at, len(echo))
            text = detokenizer.add_one(id_)
            if id_ in tokens.special and not is_of_ids:  # written by the template, or by the client as text
                text = tokens.text_of(id_)
                text = text if echo.startswith(text, at) else ""
            at += len(text)

    def of_output(self, ids: Iterable[int]) -> Iterator[int]:
        """Yield the offsets of the output's next tokens."""
        for id_ in ids:
            yield self._at
            self._at += len(self._output.add_one(id_))
