"""Add plain LoRAs derived from loaded adapters."""

from collections.abc import Callable, Mapping
from typing import cast

from diffadapt.management.activation import refuse_schedule
from diffadapt.management.owner import Owner
from diffadapt.management.snapshot import Chosen
from diffadapt.merging.merge import expand_
from diffadapt.to_lora.change import Sources
from diffadapt.to_lora.derive import Maker, derive_
from diffadapt.to_lora.report import Conversion


def derive_adapter_(owner: Owner, adapters: Chosen, name: str, maker: Callable[[Sources], Maker]) -> Conversion:
    """Add the LoRA `name` that `maker` makes from `adapters`, inactive; see `Adapters.to_lora` and `Adapters.combine`.

    Args:
        maker: see `to_lora.derive.derive_`.
    """
    snapshot = owner.snapshot()
    snapshot.refuse_name(name)
    for bank in snapshot.banks.values():
        expand_(bank)
    wanted, strengths = snapshot.resolve(adapters)
    for source, strength in wanted.items():
        refuse_schedule(name, source, strength)
    # No strengths by sample, which were refused.
    report = derive_(snapshot.models, name, cast(Mapping[str, Mapping[str, float | list[float]]], strengths), maker)
    owner.changed()
    return report
