"""The base model: a Hugging Face model with our attention and linear layers."""
