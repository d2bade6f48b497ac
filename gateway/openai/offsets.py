"""Where tokens begin in a choice's text, in characters: the `text_offset` of completions. Pure.

A token that is no part of the text begins where the next one does, and so does each byte of a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from protocol.wire.tokens import Detokenizer, TokenTable


class TextOffsets:
    """The offsets of one choice, which come in pieces."""

    def __init__(self, tokens: TokenTable, echo: str) -> None:
        """echo: what the text begins with."""
        self._tokens = tokens
        self._echo = echo
        self._at = len(echo)
        self._output = Detokenizer(tokens)

    def of_prompt(self, ids: Sequence[int]) -> Iterator[int]:
        """Make the offsets of the prompt's tokens, one after the other."""
        tokens, echo = self._tokens, self._echo
        # Without special tokens it is the same either way, and nothing has to be decoded as a whole.
        is_of_ids = tokens.special.isdisjoint(ids) or tokens.decode(ids, special=True) == echo
        detokenizer = Detokenizer(tokens, special=is_of_ids)
        at = 0
        for id_ in ids:
            yield min(at, len(echo))
            text = detokenizer.add_one(id_)
            if id_ in tokens.special and not is_of_ids:  # from the template, or spelled out by the client
                text = tokens.text_of(id_)
                text = text if echo.startswith(text, at) else ""
            at += len(text)

    def of_output(self, ids: Iterable[int]) -> Iterator[int]:
        """Make the offsets of further tokens of the output, one after the other."""
        for id_ in ids:
            yield self._at
            self._at += len(self._output.add_one(id_))
