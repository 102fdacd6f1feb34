"""What loading and recomputing cost, in seconds."""
