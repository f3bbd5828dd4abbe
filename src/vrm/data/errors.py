"""The error that data raise when they are read and cannot be used."""

from __future__ import annotations


class BadData(ValueError):
    """Data that cannot be used, found while they are read. The message says which, why, and what to do."""

    exit_code = 1
