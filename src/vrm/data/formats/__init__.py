"""How data sets lie on disk: one reader for each layout, and the decoding of encoded images.

A reader returns ``None`` if nothing of its layout is there, and raises ``ValueError``, naming the file, if the layout
is incomplete or broken. No reader executes anything that a file contains. Layouts of plain pixels are read at once;
those of encoded images are only found (:class:`~vrm.data.formats.layout.EncodedFiles`), so that decoded images can come
from the cache instead.
"""
