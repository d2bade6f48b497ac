"""The scheduler against a fleet in virtual time: what a policy would do to a load, in seconds instead of hours."""
