"""Files that look like adapters and are something else, each recognised to be refused by its name."""

import re

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict


def _foreign(name: str, keys: str, what: str) -> Format:
    """A kind of file that has keys like these."""
    pattern = re.compile(keys)

    def locate(header: Header, names: Names) -> dict[str, Verdict]:
        raise AdapterError(what)

    return Format(
        name,
        lambda header: any(map(pattern.match, header.keys)),
        locate,
        lambda header: lambda component, path, rank: None,
        None,
    )


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
