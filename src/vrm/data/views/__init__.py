"""Views: random augmentations of images, each a pure function of (seed, epoch, sample, view)."""
