"""Whose calls are let in, what they may cost, what they have cost, and who did what."""
