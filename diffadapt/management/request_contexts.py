"""The context managers of `pipe.adapters`: which adapters act, how strongly and where, for one request."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.management.activation import restoring, scheduled
from diffadapt.management.call_forms import Strengths, chosen_of
from diffadapt.management.collection import AdapterCollection
from diffadapt.management.per_sample import mixed_per_sample
from diffadapt.management.regional import within_regions
from diffadapt.management.snapshot import Chosen
from diffadapt.management.weights import unmerged
from diffadapt.runtime.locks import exclusive
from diffadapt.strengths.schedules import Schedule


class RequestContexts(AdapterCollection):
    """Adapters by name, with states for one request: on leaving a `with` block, the state before returns."""

    def scheduled(self, adapters: Chosen, scheduler: Any = None) -> AbstractContextManager[None]:
        """Make exactly these adapters active inside the `with` block; restore the state before on leaving.

        Args:
            adapters: names and strengths as for `activate`.
            scheduler: the scheduler that steps a loop of your own, for schedules to follow; defaults to the pipeline's.
        """
        if isinstance(scheduler, (int, float, Schedule, Mapping, Sequence)):
            raise AdapterError(f"scheduled: {scheduler!r} is no scheduler; pass {{name: strength}} for strengths")
        return scheduled(self._owner, chosen_of("scheduled", adapters, None), scheduler)

    def activated(self, adapters: Chosen, strengths: Strengths | None = None) -> AbstractContextManager[None]:
        """Make exactly these adapters active inside the `with` block; restore the state before on leaving.

        Other threads that want to use adapters of the same models wait until then.

        Args:
            adapters, strengths: names and strengths as for `activate`.
        """
        return scheduled(self._owner, chosen_of("activated", adapters, strengths))

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the models for this thread inside the `with` block, and change nothing about them.

        A call of a pipeline has to run with the same adapters from its first to its last step, and a pipeline can run
        one call at a time. Inside the block, other threads that want to change, load or activate adapters wait, and
        those that call a model without waiting get an error. The other blocks of `pipe.adapters` hold the models, too.
        """
        return exclusive(self._owner.models().values())

    def per_sample(
        self, mixes: Sequence[Chosen], *, images: int | None = None, scheduler: Any = None
    ) -> AbstractContextManager[None]:
        """Give every prompt of a batch its own mix of adapters inside the `with` block; restore the state on leaving.

        Row i of the result is what a run with prompt i and mix i alone returns. The batch may be repeated for guidance,
        and every prompt for its images. The pipeline has to be called with as many prompts (and negative prompts, if
        any) as there are mixes. After `prepare_hotswap(..., samples=N)`, up to N mixes, empty ones too, need no
        recompile, except that a compiled model may be compiled anew for another size of its batch.

        Args:
            mixes: for every prompt the adapters and strengths that `activate` takes: `{"a": 1.0}`, `["a", "b"]`, `{}`.
                Schedules follow the steps of the call, which all prompts share.
            images: number of images per prompt; defaults to the `num_images_per_prompt` of the pipeline call.
            scheduler: the scheduler that steps a loop of your own, for schedules to follow; defaults to the pipeline's.

        Raises:
            AdapterError: a mix that `activate` would refuse, more mixes than the slots have samples, or an adapter on
                routed experts. The call raises it if there are more or fewer prompts than mixes, or if a schedule over
                steps goes beyond the last step of the run.
        """
        return mixed_per_sample(self._owner, mixes, images, scheduler)

    def regions(self, masks: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Let each of these adapters act in a part of the picture only inside the `with` block.

        The change of an adapter is multiplied by its mask at every position of the picture. Where layers see no picture
        (text, the time, pooled vectors; text encoders), it is multiplied by the mean of the mask. So a mask of ones is
        no mask, one of zeros the base model, and complementary masks of one adapter add up to it. Adapters that are not
        active are activated at their strengths. Other active adapters act everywhere. Another mask for the same picture
        size needs no recompile.

        Args:
            masks: adapter name -> its mask over the whole picture, of any resolution: numbers from 0 to 1 or booleans,
                (height, width) or (1, height, width), as a tensor, an array or a grey PIL image; with (prompts, height,
                width), every prompt of a batch has its own. Blocks inside the block replace the masks that they name.

        Raises:
            AdapterError: an unknown or merged adapter, something that is no mask, slots without room for all adapters
                at once, or a model of which it is not known where it has the tokens of a picture.
        """
        return within_regions(self._owner, masks)

    @contextmanager
    def disabled(self) -> Generator[None, None, None]:
        """Run the base model inside the `with` block, without active or merged adapters; restore them on leaving."""
        with unmerged(self._owner), restoring(self._owner):
            self._owner.snapshot().set_active_(())
            yield
