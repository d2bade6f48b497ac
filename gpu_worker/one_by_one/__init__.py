"""Models whose sequences run unbatched, each with its own transformers cache."""
