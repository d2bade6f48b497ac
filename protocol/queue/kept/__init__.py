"""Records that outlive a connection: files, batches, jobs, conversations and webhooks."""
