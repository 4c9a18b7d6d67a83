"""Everything that talks to process groups."""
