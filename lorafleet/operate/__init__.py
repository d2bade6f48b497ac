"""The commands that ask a running fleet over HTTP."""
