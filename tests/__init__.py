"""The tests of imagemesh."""
