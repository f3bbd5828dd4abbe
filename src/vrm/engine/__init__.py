"""What happens to one batch: the step, what guards it, and where and how fast it runs."""
