"""Single requests: their timelines, their history, and replays."""
