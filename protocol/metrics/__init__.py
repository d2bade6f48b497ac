"""The metrics of all services for Prometheus: every series, the names in their labels, and the pages."""
