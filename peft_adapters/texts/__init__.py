"""Texts that adapters bring: supported files and tokenizers, and limits on their cost."""
