"""The layouts in which data sets lie on disk, one file each.

A reader returns ``None`` when its layout is not there at all, and raises ``ValueError``, naming the file, when it is
there but incomplete or broken. Nothing that a file contains is ever executed.
"""
