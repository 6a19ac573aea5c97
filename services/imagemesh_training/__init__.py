"""Training of the models that imagemesh ships: plain batch jobs, never imported by a service."""
