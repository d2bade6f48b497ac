"""What outlives a connection: files, batches, jobs, conversations, and those who are told of an end."""
