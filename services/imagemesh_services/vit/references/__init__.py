"""Reference pictures for IP-Adapters."""
