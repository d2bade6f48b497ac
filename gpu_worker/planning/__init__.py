"""The sequences of an engine, and which of their tokens the next step computes."""
