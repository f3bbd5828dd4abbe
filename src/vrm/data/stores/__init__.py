"""Where the images of a split are kept, and how their batches reach the training device."""
