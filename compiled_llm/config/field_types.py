"""Types of config values: strict numbers, sizes in bytes and paths.

Pydantic by default converts `true` and `"4"` to numbers; these types refuse both, so that a slip in
a YAML file is reported. The upper bounds only catch slips of the pen.
"""

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from compiled_llm.config.messages import excerpt


def parse_integer(value: object) -> object:
    """Convert a float that is a whole number, such as 1e3, to an integer; refuse booleans."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {value}")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*", value)
    if match is None:
        raise ValueError(f"expected auto or a size such as 512MiB or 2GiB, got {excerpt(value)}")
    number, unit = match.groups()
    base = 1024 if unit and unit.endswith("i") else 1000
    return int(Decimal(number) * base ** (" KMGT".index(unit[0]) if unit else 0))


def _parse_path(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError(f"expected a path, got {value!r}")
    return value


Integer = Annotated[int, BeforeValidator(parse_integer), Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
NumSeqs = Annotated[Integer, Field(gt=0, le=2**16)]
NumTokens = Annotated[Integer, Field(gt=0, le=2**24)]
Bytes = Annotated[Integer, BeforeValidator(_parse_bytes), Field(gt=0, le=2**50)]
FilePath = Annotated[Path, BeforeValidator(_parse_path)]
Auto = Literal["auto"]
