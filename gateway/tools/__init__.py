"""Tool calls: how they are asked for, constrained and read."""
