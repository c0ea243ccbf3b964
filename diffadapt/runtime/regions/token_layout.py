"""Where the tokens of a picture are in the sequences that a model's layers get: the record for one class of models.

The facts for diffusers' models are in `families/token_layouts.py`.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from diffadapt.errors import AdapterError

Role: TypeAlias = Literal["none", "picture", "joint", "either"]
"""The tokens that a layer gets.

| role | tokens |
|---|---|
| "none" | none of the picture: text, the time, sizes, pooled vectors |
| "picture" | those of the picture, and of reference pictures that follow it |
| "joint" | those of the picture and of the text in one sequence |
| "either" | in one call those of the picture, in another those of the text |
"""


class Tokens(NamedTuple):
    """A sequence of tokens with a picture in it, row by row (row-major).

    Attributes:
        role: the role of the layers that get the sequence.
        length: the number of tokens in a row of the batch.
        grid: the height and width of the picture in tokens.
        starts: the index of the picture's first token: for all rows of the batch, or for every row. Negative if the
            sequence has no picture.
        frames: the number of pictures that follow one another, which all have the same regions.
        flat: whether layers get the sequences of all rows joined along one axis, as a matrix.
    """

    role: Role
    length: int
    grid: tuple[int, int]
    starts: tuple[int, ...] = (0,)
    frames: int = 1
    flat: bool = False


class Picture(NamedTuple):
    """What a call of a model draws, in tokens.

    Attributes:
        grids: the heights and widths at which layers get the picture with two axes of its own.
        sequences: the sequences in which layers get it otherwise, no two with the same role and length.
    """

    grids: tuple[tuple[int, int], ...]
    sequences: tuple[Tokens, ...] = ()


@dataclass(frozen=True)
class TokenLayout:
    """The facts for one class of models.

    Attributes:
        roles: role -> regular expression that occurs in the paths of its layers. The first that matches applies; other
            layers have the role "picture".
        picture: returns the picture for a call of the model, given the model and the arguments by name. Raises
            `AdapterError` for calls whose tokens it does not know.
    """

    picture: Callable[[nn.Module, Mapping[str, Any]], Picture]
    roles: Mapping[Role, str]

    def role(self, path: str) -> Role:
        """Return the role of the layer at a module path."""
        for role, expression in self._patterns.items():
            if expression.search(path):
                return role
        return "picture"

    def of_call(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Picture:
        """Return the picture that a call of `model` with these arguments draws.

        Raises:
            AdapterError: it is not known where the picture's tokens are.
        """
        # The class's own, since hooks of other libraries may stand in the place of the instance's.
        signature = inspect.signature(type(model).forward)
        try:
            bound = signature.bind(model, *args, **kwargs)
        except TypeError as error:
            raise AdapterError(f"regions: a {type(model).__name__} is called with other arguments: {error}") from error
        bound.apply_defaults()
        return self.picture(model, bound.arguments)

    @cached_property
    def _patterns(self) -> dict[Role, re.Pattern[str]]:
        return {role: re.compile(expression) for role, expression in self.roles.items()}
