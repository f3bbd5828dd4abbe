"""Data sets by name, one file each, and how they are found, downloaded, decoded and cached."""
