"""The kinds of numbers that settings are, and what all sections of a configuration have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[Positive, Positive]


def pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def sorted_terms(value: Any) -> Any:
    letters = set(value) if isinstance(value, str) else set()
    return "".join(sorted(value, key="qkv".index)) if letters and letters <= set("qkv") else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True, allow_inf_nan=False)
