"""The commands that call a running fleet over HTTP."""
