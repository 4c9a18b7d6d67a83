"""One short file per command; the only place that knows of Hydra."""
