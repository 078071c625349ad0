"""The two splits every data set has."""

from qadtr_brevitas.errors import UsageError

SPLITS = ("train", "test")


def check_split(split: str) -> None:
    """Refuses any other name.

    Raises:
        UsageError: the split is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
