"""What every plug-in is: a frozen keyword-only dataclass whose fields are its recipe keys.

    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class Lavan:
        "Universal targeted patch (Karmon et al. 2018)."

        steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 500

`dataclass` is pydantic's, so values are checked wherever the plug-in is made, from a recipe or from Python.
A plug-in file imports torch and its friends inside methods only: recipes are checked before anything heavy loads.
"""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

__all__ = ["STRICT", "Field", "dataclass"]
