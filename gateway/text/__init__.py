"""Text and tokens: tokenizers, and reading an answer."""
