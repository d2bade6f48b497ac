"""Bases whose weights stay quantised in memory: GGUF files, and folders that are quantised here."""
