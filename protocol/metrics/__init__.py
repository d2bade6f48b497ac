"""What the services count and show to Prometheus: every series, the names in their labels, and the pages."""
