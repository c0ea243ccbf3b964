"""The classes of diffusers and transformers whose own adapter methods serve the adapters of this library, too."""

import sys
from collections.abc import Callable
from typing import Any

from diffadapt.management.manager import Adapters
from diffadapt.pipelines.base_classes import MODEL_CLASSES, PIPELINE_CLASSES
from diffadapt.pipelines.model_methods import ModelMethods
from diffadapt.pipelines.pipeline_methods import PipelineMethods


def serve_diffusers_methods(adapters_of: Callable[[Any], Adapters]) -> None:
    """Make the adapter methods of all pipelines and models that are imported serve the adapters of this library.

    Args:
        adapters_of: returns the adapters of a pipeline or model.
    """
    for classes, methods in ((PIPELINE_CLASSES, PipelineMethods), (MODEL_CLASSES, ModelMethods)):
        for module, name in classes.items():
            base = getattr(sys.modules.get(module), name, None)
            # Others are not imported yet.
            if base is not None:
                methods.serve(base, adapters_of)
