"""Files for the second denoiser of a pipeline alone (Wan 2.2's `transformer_2`).

Other programs read one denoiser from a file and are told which model it is for, so the file has the names of the first:
diffusers reads `transformer.` into the second transformer with `load_into_transformer_2=True`, and never reads
`transformer_2.`. An entry in the metadata, which only this library reads, says which denoiser the file is for.

A file for both has both names. This library reads all of it, diffusers 0.42.1 the first half.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from diffadapt.formats.document import AdapterState
from diffadapt.runtime.components import is_text_encoder

FIRST, SECOND = "transformer", "transformer_2"
_ENTRY = "diffadapt_component"
_LOGGER = logging.getLogger(__name__)


def as_first(state: AdapterState) -> AdapterState:
    """Return the adapter with the second denoiser in the place of the first, if it has the second alone."""
    metadata = {key: value for key, value in state.metadata.items() if key != _ENTRY}
    if [component for component in state.layers if not is_text_encoder(component)] != [SECOND]:
        return replace(state, metadata=metadata)
    layers = {FIRST if component == SECOND else component: found for component, found in state.layers.items()}
    layouts = {**state.layouts, FIRST: state.layouts.get(SECOND, {})}
    return replace(state, layers=layers, layouts=layouts, metadata={**metadata, _ENTRY: SECOND})


def warn_of_both(state: AdapterState) -> None:
    """Log that diffusers reads only a part of what is written for two denoisers."""
    if {FIRST, SECOND} <= state.layers.keys():
        _LOGGER.warning(
            "the file is for two denoisers: diffusers reads the layers of %s and never those of %s; for diffusers, "
            "load each with components=[...] and save it in a file of its own",
            FIRST,
            SECOND,
        )


def entry(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entry of `as_first` in the metadata, if it is there."""
    return {key: value for key, value in metadata.items() if key == _ENTRY}


def is_for_second(metadata: Mapping[str, str]) -> bool:
    """Return whether a file with this metadata is for the second denoiser, though it has the names of the first."""
    return metadata.get(_ENTRY) == SECOND
