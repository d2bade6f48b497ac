"""The scheduler and simulated workers in virtual time: what a policy makes of a load, in seconds instead of hours."""
