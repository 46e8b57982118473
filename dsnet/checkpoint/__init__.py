"""Weights in and out: the public PyTorch and Paddle checkpoints, and our own safetensors.

``formats`` turns a file into names and tensors, ``paddle`` is its reader of Paddle's pickles,
``layout`` renames them to ours and reads the architecture off their shapes, ``file`` checks and
loads them, ``save`` writes ours.
"""

from .errors import CheckpointError
from .file import Checkpoint, load_checkpoint, read_checkpoint
from .save import convert_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
