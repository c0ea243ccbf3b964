"""The arguments with which pipelines draw what was trained."""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image


class Drawing(Protocol):
    """The arguments of a pipeline's call, except for sizes, generators and the kind of output."""

    def __call__(
        self, captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
    ) -> dict[str, Any]:
        """Return the arguments.

        Args:
            captions: What is drawn, one picture for each.
            guidance: The scale of classifier-free or distilled guidance. Defaults to the pipeline's own.
            steps: The number of denoising steps. Defaults to the pipeline's own.
            references: The reference pictures, the same for all captions.
        """
        ...


def usual(
    captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
) -> dict[str, Any]:
    """Return the arguments under the names that most pipelines have for them."""
    given: dict[str, Any] = {"prompt": list(captions)}
    given |= {} if guidance is None else {"guidance_scale": guidance}
    given |= {} if steps is None else {"num_inference_steps": steps}
    return given | ({"image": list(references)} if references else {})


def usual_with(**further: Any) -> Drawing:
    """Return a function like `usual` whose result has further arguments."""

    def drawing(
        captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
    ) -> dict[str, Any]:
        return usual(captions, guidance, steps, references) | further

    return drawing
