"""Model families, one file each. Importing this package registers them all (and loads torch, but not diffusers)."""

from qdiff.models import cogvideox as cogvideox
from qdiff.models import pixart as pixart
from qdiff.models import stable_diffusion as stable_diffusion
from qdiff.models import wan as wan
from qdiff.models.base import FAMILIES, Family
from qdiff.models.model import Model, Request

__all__ = ["FAMILIES", "Family", "Model", "Request"]
