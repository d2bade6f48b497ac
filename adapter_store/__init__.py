"""Mirrors adapters from where they live into checked, content-addressed blobs and keeps the catalogue of names.

Never imports torch, never serves a byte that was not validated.
"""
