"""The long campaigns, which ``make test-full`` adds: see ``__main__``."""
