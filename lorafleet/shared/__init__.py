"""Shared by commands: parser, flags, access to a fleet's API and queue, tables."""
