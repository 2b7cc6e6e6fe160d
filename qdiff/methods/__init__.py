"""Quantization methods, one file each. Importing this package registers them all."""

from qdiff.methods import adaround as adaround
from qdiff.methods import awq as awq
from qdiff.methods import bias as bias
from qdiff.methods import center as center
from qdiff.methods import clip as clip
from qdiff.methods import dgq as dgq
from qdiff.methods import element as element
from qdiff.methods import flexround as flexround
from qdiff.methods import gptq as gptq
from qdiff.methods import low_rank as low_rank
from qdiff.methods import repq as repq
from qdiff.methods import rotate as rotate
from qdiff.methods import scales as scales
from qdiff.methods import shift as shift
from qdiff.methods import smooth as smooth
from qdiff.methods import timestep_scales as timestep_scales
from qdiff.methods.base import METHODS, Decisions, LayerGroup, apply_method, check_options
from qdiff.methods.learned import RECONSTRUCTIONS, check_reconstruction

__all__ = [
    "METHODS",
    "RECONSTRUCTIONS",
    "LayerGroup",
    "Decisions",
    "apply_method",
    "check_options",
    "check_reconstruction",
]
