"""Measuring a run's steps: floating-point operations, the machine's matmul rate, time by phase."""
