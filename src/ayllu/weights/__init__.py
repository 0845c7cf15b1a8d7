"""Bytes to tensors and back: file formats, name maps, the local store and its sources."""
