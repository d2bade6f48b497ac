"""Models whose sequences run one by one, each with the cache that transformers makes for it."""
