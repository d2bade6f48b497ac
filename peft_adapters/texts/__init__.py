"""The texts that adapters bring: which files, which tokenizers, and what each of these may cost."""
