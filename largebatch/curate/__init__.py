"""What happens to text before training."""
