"""The CIFAR networks of the knowledge distillation literature, one family a file."""
