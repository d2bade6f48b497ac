"""Whether one more call is let in."""
