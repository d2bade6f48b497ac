"""What outlives a connection: files, batches, jobs, conversations and webhooks."""
