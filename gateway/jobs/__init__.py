"""Calls that outlive their client: stored, waited for, read again and streamed."""
