"""Adapters by name.

For requests: `resolver.py` turns a model name into who answers it, with `aliases.py` for the alias of the name and
`merged.py` for merges of adapters. For operators: `operator_routes.py` is the HTTP of `/v1/adapters`, `operations.py`
what it does, `memory.py` how workers and stores give memory back. For both: `views.py` has the JSON objects, and
`fleet_view.py` the state of the fleet.
"""
