"""What commands share: their parser and flags, a fleet's API and queue, tables."""
