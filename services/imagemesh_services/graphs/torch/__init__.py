"""From torch's modules to graphs."""
