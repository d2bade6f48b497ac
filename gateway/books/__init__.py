"""The fleet's accounting: tenants' usage, the audit log, and time series."""
