"""A file a backend."""
