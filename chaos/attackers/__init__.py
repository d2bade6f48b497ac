"""Attackers of a fleet under faults: the calls of a hostile tenant while other tenants are served."""
