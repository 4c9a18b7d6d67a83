"""Entry of the console script `largebatch`, of `python -m largebatch` and of launchers."""

import os
import sys


def main() -> int:
    """Run the command line and return its exit code."""
    from largebatch.cli import app
    from largebatch.cli.failures import end_failed_rank, is_rank

    code = app.main(sys.argv[1:])
    if code and is_rank():
        end_failed_rank(code)
    if is_rank() and os.environ["RANK"] != "0":
        # All that such a rank did is done and written, by rank 0. Taking the interpreter down would
        # race with threads of torch's process group, and has ended in an abort once in hundreds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return code


if __name__ == "__main__":
    sys.exit(main())
