"""Pre-train text-embedding models with very large contrastive batches."""
