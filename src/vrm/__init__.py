"""Knowledge distillation for PyTorch: virtual relation matching, and the methods it is compared with."""
