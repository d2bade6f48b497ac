"""Clients under faults: they retry as a careful user does, and record everything that they are shown."""
