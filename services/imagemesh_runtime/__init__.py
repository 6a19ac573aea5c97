"""What every imagemesh service shares: server, client, tensors, batching, configuration, errors and metrics."""
