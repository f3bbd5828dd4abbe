"""The layouts in which data sets lie on disk, one file each.

A reader returns ``None`` when its layout is not there at all, and raises ``ValueError``, naming the file, when it is
there but incomplete or broken. Nothing that a file contains is ever executed. Layouts of encoded images are found first
and read later, so that the cache can spare the decoding; those of plain pixels are read at once, as fast as any cache.
"""
