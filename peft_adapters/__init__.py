"""Adapters as PEFT writes them: what each file means, and why one is refused.

Imports neither torch nor a service; of `protocol` only its errors and messages.
"""
