"""How pipelines are trained. A new family is a `TrainingFamily` in a file of this folder and an entry here."""

from diffadapt.errors import AdapterError
from diffadapt.training.families.auraflow import AURAFLOW
from diffadapt.training.families.cogview4 import COGVIEW4
from diffadapt.training.families.family import LevelSampling, Pipeline, Process, Size, Tensors, TrainingFamily, latents
from diffadapt.training.families.flux import CHROMA, FLUX, FLUX_CONTROL, FLUX_FILL, FLUX_KONTEXT
from diffadapt.training.families.flux2 import FLUX2, FLUX2_KLEIN
from diffadapt.training.families.hidream import HIDREAM
from diffadapt.training.families.hunyuan import HUNYUAN_IMAGE
from diffadapt.training.families.ideogram4 import IDEOGRAM4
from diffadapt.training.families.krea2 import KREA2
from diffadapt.training.families.lumina2 import LUMINA2
from diffadapt.training.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from diffadapt.training.families.qwen import QWEN, QWEN_21, QWEN_EDIT, QWEN_EDIT_PLUS
from diffadapt.training.families.sana import SANA
from diffadapt.training.families.schedules import shifted
from diffadapt.training.families.sd import SD, SDXL
from diffadapt.training.families.sd3 import SD3
from diffadapt.training.families.video import LTX, WAN
from diffadapt.training.families.zimage import ZIMAGE

__all__ = [
    "FAMILIES",
    "LevelSampling",
    "Pipeline",
    "Process",
    "Size",
    "Tensors",
    "TrainingFamily",
    "family_of",
    "latents",
    "shifted",
]

FAMILIES: tuple[TrainingFamily, ...] = (
    SD,
    SDXL,
    SD3,
    FLUX,
    FLUX_KONTEXT,
    FLUX_FILL,
    FLUX_CONTROL,
    CHROMA,
    FLUX2,
    FLUX2_KLEIN,
    QWEN,
    QWEN_EDIT,
    QWEN_EDIT_PLUS,
    QWEN_21,
    ZIMAGE,
    KREA2,
    LUMINA2,
    SANA,
    PIXART_SIGMA,
    PIXART_ALPHA,
    AURAFLOW,
    HIDREAM,
    IDEOGRAM4,
    COGVIEW4,
    HUNYUAN_IMAGE,
    WAN,
    LTX,
)


def family_of(pipe: Pipeline) -> TrainingFamily:
    """Return the family of a pipeline, by the name of its class or of a class that it is derived from.

    Raises:
        AdapterError: no family has this class.
    """
    by_name = {name: family for family in FAMILIES for name in family.pipelines}
    for kind in type(pipe).__mro__:
        if kind.__name__ in by_name:
            return by_name[kind.__name__]
    raise AdapterError(
        f"cannot train a {type(pipe).__name__}: expected one of {', '.join(sorted(by_name))}. If the model can be "
        "loaded as one of these, load it so"
    )
