"""Which record is in which batch: pure arithmetic."""
