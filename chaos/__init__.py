"""Injects random faults into a real fleet that serves clients, and checks every answer. `python -m chaos --help`."""
