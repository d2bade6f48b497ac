"""The adapter store: mirrors adapters from their sources into checked, content-addressed blobs, and manages names.

It never imports torch and never serves a byte that it has not validated.
"""
