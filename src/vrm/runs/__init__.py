"""What happens to one run: it is put together, checked, trained, recorded, and kept."""
