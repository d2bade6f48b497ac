"""Overload protection of a gateway: admission, memory accounting, read limits, and a heartbeat that is never late."""
