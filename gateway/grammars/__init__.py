"""Constraints of answers that clients request, as grammars."""
