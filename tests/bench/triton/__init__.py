"""What runs in the environment of a real Triton server, where imagemesh isn't."""
