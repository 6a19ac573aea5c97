"""The command ``imagemesh``."""
