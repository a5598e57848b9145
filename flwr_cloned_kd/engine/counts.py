"""Checks and conversions of single numbers."""

from operator import index
from typing import Any


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Refuse a value that is not an integer of at least `minimum`; NumPy's integers are integers.

    Raises:
        ValueError: naming what was expected and what was found.
    """
    try:
        number = index(value)
    except TypeError:
        expected = f"an integer of at least {minimum}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def plain(value: Any) -> Any:
    """Return a number of NumPy or PyTorch as a number of Python, and other values as they are.

    Neither JSON nor a record of Flower can hold a number of NumPy or PyTorch.
    """
    return value.item() if hasattr(value, "item") else value
