"""Turns one or several adapters' files into the form that the pool holds."""
