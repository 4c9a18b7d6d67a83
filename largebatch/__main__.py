"""Entry of the console script `largebatch`, of `python -m largebatch` and of launchers."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    from largebatch.commands import app
    from largebatch.commands.failures import end_failed_rank, is_rank

    code = app.main(sys.argv[1:])
    if code and is_rank():
        end_failed_rank(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
