"""A gateway's view of the fleet, and its time series."""
