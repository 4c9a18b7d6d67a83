"""What commands see to before they write anything, so that no hours of work end in an error."""

from pathlib import Path

from largebatch.errors import UserError
from largebatch.files import writing


def check_replaceable(output_dir: Path, marker: str) -> None:
    """Check that a folder may take the place of what is there: nothing, or one of its own kind.

    Raises:
        UserError: There is something without `marker`, the file that all folders of a kind have.
    """
    is_free = not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir()))
    if not is_free and not (output_dir / marker).is_file():
        raise UserError(
            f"output_dir={str(output_dir)!r} holds something else (no {marker}); choose another "
            "folder, or empty it"
        )


def make_folder_of(output: Path) -> Path:
    """Return a file to write, once its folder is there.

    Raises:
        UserError: It is a folder, or its own folder can't be made.
    """
    if output.is_dir():
        raise UserError(f"output={str(output)!r} is a folder; name a file")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    return output
