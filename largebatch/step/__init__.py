"""One exact step of a global batch, in the memory of a chunk."""
