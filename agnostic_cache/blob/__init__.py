"""Blobs: states as bytes, with checksums; everything that is written or read is checked here."""
