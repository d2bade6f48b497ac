"""The fleet as a gateway sees it."""
