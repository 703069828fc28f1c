"""Model folders: find one, make one from the packaged SmolLM2, read its shape."""

from m2train.models.folder import ModelError, ModelShape, model_shape, resolve_model, weights_size

__all__ = ["ModelError", "ModelShape", "model_shape", "resolve_model", "weights_size"]
