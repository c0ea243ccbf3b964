"""diffusers' own methods for adapters of a pipeline, such as `set_adapters` and `unload_lora_weights`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.pipelines.adapter_methods import AdapterMethods, names_in
from diffadapt.pipelines.components import components_of


class PipelineMethods(AdapterMethods):
    """Replacements for the adapter methods of one pipeline. A pipeline may share models with one that has adapters."""

    served = (
        "get_active_adapters",
        "get_list_adapters",
        "set_adapters",
        "disable_lora",
        "enable_lora",
        "delete_adapters",
        "unload_lora_weights",
        "fuse_lora",
        "unfuse_lora",
        "set_lora_device",
    )
    call = "pipe.adapters"

    @staticmethod
    def models_of(owner: Any) -> list[nn.Module]:
        return list(components_of(owner).values())

    def get_active_adapters(self) -> list[str]:
        return [*(self.theirs("get_active_adapters") or ()), *self.adapters().active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        found = {name: list(names) for name, names in (self.theirs("get_list_adapters") or {}).items()}
        adapters = self.adapters()
        for name in adapters:
            for component in adapters[name].components:
                found.setdefault(component, []).append(name)
        return found

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        self._set(adapter_names, adapter_weights)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        self.adapters().clear()
        self.theirs("unload_lora_weights", *args, **kwargs)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        others = self._fuse(lora_scale, adapter_names, components)
        if others is None or others:
            options = {} if components is None else {"components": list(components)}
            options |= {"lora_scale": lora_scale, "safe_fusing": safe_fusing, "adapter_names": others}
            self.theirs("fuse_lora", **options, **kwargs)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        self.adapters().unmerge()
        self.theirs("unfuse_lora", *args, **kwargs)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: Any) -> None:
        ours = [name for name in names_in(adapter_names) if name in self.adapters()]
        if ours:
            raise AdapterError(
                f"set_lora_device: {', '.join(ours)} runs where its model does; pipe.adapters.remove() frees its "
                "memory, and an AdapterPool keeps adapters in CPU memory"
            )
        self.theirs("set_lora_device", adapter_names, device)
