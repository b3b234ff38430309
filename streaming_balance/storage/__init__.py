"""Shards on disk: tar files, codecs, the sample table, and reading straight into batch buffers."""
