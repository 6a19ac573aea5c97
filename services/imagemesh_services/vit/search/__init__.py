"""Search: vectors of pictures, kept and found."""
