"""Text and tokens: templates, tokenizers, grammars, and reading an answer."""
