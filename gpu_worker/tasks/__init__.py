"""What a model is for besides text: embeddings, labels, scores."""
