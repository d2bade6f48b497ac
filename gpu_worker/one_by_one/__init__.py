"""Models whose sequences run unbatched, each with its own cache of transformers."""
