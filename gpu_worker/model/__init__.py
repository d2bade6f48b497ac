"""The base model: a Hugging Face model whose attention and linear layers are ours."""
