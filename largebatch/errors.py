"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a config, a file or an environment, told in one readable line.

    The message names the file, key or option, the value found, the rule it breaks and the cure.
    The command line prints it without a traceback and exits with code 1.
    """
