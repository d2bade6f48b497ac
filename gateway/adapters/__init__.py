"""Adapters by name.

For calls: `resolver.py` resolves a model name to a target, with `aliases.py` for the name's alias and `merged.py` for
merges of adapters. For operators: `operator_routes.py` has the routes of `/v1/adapters`, `operations.py` implements
them, `memory.py` frees memory of workers and stores. For both: `views.py` has the JSON objects, and `residency.py` the
metrics of where adapters are.
"""
