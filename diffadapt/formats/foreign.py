"""Files that look like adapters but are something else. They are recognised in order to be refused by name."""

import re

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict


def _foreign(name: str, keys: str, refusal: str) -> Format:
    """Return a format that refuses every file with keys of its own.

    Args:
        name: the name of the format.
        keys: a regular expression for the beginning of its keys.
        refusal: the message to refuse it with.
    """
    pattern = re.compile(keys)

    def locate(header: Header, names: Names) -> dict[str, Verdict]:
        raise AdapterError(refusal)

    return Format(name, lambda header: any(map(pattern.match, header.keys)), locate)


IP_ADAPTER = _foreign(
    "ip-adapter",
    r"image_proj\.|ip_adapter|(?:double|single)_blocks\.\d+\.processor\.ip_adapter",
    "this is an IP-Adapter, which adds attention to an image and is no adapter of weights; use pipe.load_ip_adapter(). "
    "The LoRA that FaceID needs beside it is a file of its own",
)
CONTROLNET_LLLITE = _foreign(
    "controlnet-lllite",
    r"lllite_",
    "this is a ControlNet-LLLite, which reads a control image and is no adapter of weights; diffusers cannot run it",
)
