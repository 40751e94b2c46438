"""The paper's networks (section 4.1): BNet, BNet^C, Dec8, Dec8-640, Dec8-768, Dec3; else any torchvision classifier."""

from dist_gsl.models.config import NetworkConfig
from dist_gsl.models.registry import create_model, input_shape, model_names

__all__ = ["NetworkConfig", "create_model", "input_shape", "model_names"]
