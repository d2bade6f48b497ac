"""A small model of the base's vocabulary, which drafts tokens that the base checks."""
