"""The backends, one file each; ../backend.py lists them."""
