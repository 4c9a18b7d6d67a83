"""Presets in yaml, shipped inside the wheel."""
