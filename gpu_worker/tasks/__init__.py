"""Tasks of a model besides generating text: embeddings, labels, scores."""
