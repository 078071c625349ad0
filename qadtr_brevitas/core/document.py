"""The base of what is written to JSON files and read back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """A frozen record whose fields are the keys of a JSON file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
