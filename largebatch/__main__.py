"""Entry of the console script `largebatch`, of `python -m largebatch` and of launchers."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    from largebatch.commands import app

    return app.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
