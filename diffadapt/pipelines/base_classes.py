"""The classes of diffusers and transformers that all pipelines and models are derived from."""

PIPELINE_CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
"""Module -> the class of pipelines in it."""

MODEL_CLASSES = {
    "diffusers.models.modeling_utils": "ModelMixin",
    "transformers.modeling_utils": "PreTrainedModel",
}
"""Module -> the class of models in it."""
