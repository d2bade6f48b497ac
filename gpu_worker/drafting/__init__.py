"""Draft models with the base's vocabulary, whose tokens the base verifies."""
