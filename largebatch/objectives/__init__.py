"""What is optimized: a file for each objective."""
