"""Where an engine's steps spend their time."""
