"""Stand-ins, factories and waits that many tests share."""
