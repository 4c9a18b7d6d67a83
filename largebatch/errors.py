"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a config, a file or an environment, told in one readable line.

    The message names the file, key or option, the value found, the rule it breaks and the cure.
    The command line prints it without a traceback and exits with code 1.
    """


class DataError(UserError):
    """A shard or a record that can't be used: what `data.on_fault` decides about.

    The message names the shard, the member and the byte offset as far as they are known.
    `kind` is one word for counts and logs.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        assert kind in FAULT_KINDS
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments are lost otherwise on the way between processes.
        return _data_error, (str(self), self.kind)


FAULT_KINDS = (
    "missing",  # the shard is not there
    "unreachable",  # its store does not answer, or answers with errors or too few bytes
    "changed",  # its bytes are not those that were indexed
    "truncated",  # it, or a member, ends too early
    "forbidden",  # a member that must not be in a shard
    "too_large",  # a member or a text beyond the limits
    "undecodable",  # neither UTF-8 nor JSON
    "field",  # a field is missing, or holds no text
    "empty",  # an empty query or document
    "graded",  # a pair that says of itself that it is no positive one
)


def _data_error(message: str, kind: str) -> DataError:
    return DataError(message, kind=kind)
