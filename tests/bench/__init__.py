"""What imagemesh costs. Never asserted in a timed test: ``make bench`` prints ratios with their spread."""
