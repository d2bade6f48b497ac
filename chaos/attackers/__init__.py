"""Attackers of a fleet under faults: what a hostile tenant sends while others are served."""
