"""Tool calls: their definitions, grammars and parsing."""
