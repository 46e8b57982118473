"""What :func:`dsnet.optimize` returns.

``fold`` has the algebra, ``block`` a DSBlock without norms, ``embedding`` what comes before a
stage's blocks, ``network`` the module around a whole network, ``graphs`` its CUDA graphs.
"""

from .block import OptimizedBlock
from .embedding import PatchEmbedding
from .network import Optimized, OptimizedDSNet

__all__ = ["Optimized", "OptimizedBlock", "OptimizedDSNet", "PatchEmbedding"]
