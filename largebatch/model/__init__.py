"""The encoder: backbone, pooling and export."""
