"""Front ends. `v2` holds the codecs, pure and without I/O; each other folder is one wire."""
