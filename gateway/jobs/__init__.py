"""Jobs: calls that outlive their client, and can be polled, awaited and streamed."""
