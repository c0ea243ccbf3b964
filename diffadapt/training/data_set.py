"""The data set of a run, read and checked before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffadapt.errors import UsageError
from diffadapt.training.caches import digest
from diffadapt.training.data.folders import Example, read_folder
from diffadapt.training.options import TrainingOptions


@dataclass
class DataSet:
    """The pictures to learn.

    Attributes:
        examples: the pictures that are trained.
        held_out: the pictures that are only measured.
        notes: what the user should know.
        digests: digests of what options stand for, by option; see `checkpoint.fingerprint`.
    """

    examples: list[Example]
    held_out: list[Example] = field(default_factory=list[Example])
    notes: list[str] = field(default_factory=list[str])
    digests: dict[str, str] = field(default_factory=dict[str, str])


def read_data(options: TrainingOptions) -> DataSet:
    """Return the data set of a run.

    Raises:
        UsageError: a folder, a caption or a picture has to be changed; the message names all of them.
    """
    found = [
        read_folder(
            Path(folder.path),
            options.instance_prompt if folder.prompt is None else folder.prompt,
            column=options.caption_column,
            repeats=folder.repeats,
            weight=folder.weight,
            control=None if folder.control is None else Path(folder.control),
            background=options.background,
        )
        for folder in options.folder_options
    ]
    examples = [example for part in found for example in part.examples]
    notes = [note for part in found for note in part.notes]
    digests = {"folders" if options.folders else "instance_data_dir": digest_of(examples)}
    held_out: list[Example] = []
    if options.held_out_pictures:
        if options.held_out_pictures >= len(examples):
            raise UsageError(
                f"--held_out_pictures is {options.held_out_pictures}, but there are only {len(examples)} pictures"
            )
        # Spread over the whole set, and the same whenever the set is the same.
        stride = len(examples) / options.held_out_pictures
        places = {int(number * stride) for number in range(options.held_out_pictures)}
        held_out = [example for place, example in enumerate(examples) if place in places]
        examples = [example for place, example in enumerate(examples) if place not in places]
    masks = [example for example in examples if example.mask is not None or example.transparent]
    if options.masked_loss and not masks:
        raise UsageError(
            "--masked_loss has no effect: no picture has an alpha channel, or a mask beside it (name-masklabel.png)"
        )
    if options.masked_loss and len(masks) < len(examples):
        notes.append(f"{len(examples) - len(masks)} pictures have no mask and are trained as a whole")
    if not options.masked_loss and any(example.mask is not None for example in examples):
        notes.append("there are masks (name-masklabel.png), which have no effect without --masked_loss")
    return DataSet(examples, held_out, notes, digests)


def digest_of(examples: Sequence[Example]) -> str:
    """Return a digest of pictures and captions, wherever they are."""
    return digest([(e.path.name, e.digest, e.captions, e.repeats, e.weight) for e in examples])
