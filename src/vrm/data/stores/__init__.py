"""Where decoded images lie, and how batches of them reach the training device."""
