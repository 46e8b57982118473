"""The Dual-stream Network (DS-Net, NeurIPS 2021) on fused kernels."""

from dsnet_kernels.version import __version__

from .block import DSBlock
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .export import ExportError, export_model
from .model import DSNet, create_model
from .optimize import optimize
from .variants import list_models

__all__ = [
    "CheckpointError",
    "DSBlock",
    "DSNet",
    "ExportError",
    "__version__",
    "create_model",
    "export_model",
    "list_models",
    "load_checkpoint",
    "optimize",
    "save_checkpoint",
]
