"""Modules of models as graphs: made once of torch's, kept on the disk, and run by other engines."""
