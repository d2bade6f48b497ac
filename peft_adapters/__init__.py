"""Adapters in PEFT's format: the meaning of each file, and the reasons for refusal.

Imports neither torch nor a service; of `protocol` only errors and messages.
"""
