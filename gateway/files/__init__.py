"""Files that clients upload and batches write: their bytes, their records, and OpenAI's routes for them."""
