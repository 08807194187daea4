"""Types of the fields of results: what a file may say, and nothing else."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Fields(BaseModel):
    """Base of all: no value is converted, numbers are finite, and fields that no type names are let pass."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has line breaks or control characters")
    return text


Printable = Annotated[str, AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Flag = Annotated[int, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=1, le=1e15)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
