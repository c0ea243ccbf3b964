"""The classes of diffusers that all pipelines are derived from."""

PIPELINE_CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
"""Module -> the class in it."""
