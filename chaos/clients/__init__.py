"""Clients under faults: each asks as careful users do, and records everything that it is shown."""
