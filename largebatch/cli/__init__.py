"""The command line around Hydra: compose, check, help, launch."""
