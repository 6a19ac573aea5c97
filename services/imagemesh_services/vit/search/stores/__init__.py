"""What keeps vectors: a module each."""
