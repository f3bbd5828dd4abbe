"""What a training step costs in time and memory, and what methods cost beside the networks."""
