"""Tokenizers, and the parsing of answers' text."""
