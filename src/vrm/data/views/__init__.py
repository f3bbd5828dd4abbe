"""Views: random augmentations as functions of (seed, epoch, sample, view)."""
