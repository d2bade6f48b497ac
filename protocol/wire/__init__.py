"""What is sent through the queue: messages, their encoding, keys, records and errors. Imports no Redis client."""
