"""The text encoder service: prompts in, embeddings out."""
