"""What became of single requests: their timelines, and whether they come out the same again."""
