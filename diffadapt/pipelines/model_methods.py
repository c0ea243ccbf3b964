"""The adapter methods of the models of diffusers and transformers, such as `set_adapters`, on a model with adapters.

diffusers calls them from the methods of a pipeline, and both libraries call them while they load an adapter with peft.
So names of peft alone leave the adapters of this library as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.pipelines.adapter_methods import AdapterMethods, names_in
from diffadapt.strengths.by_prefix import Strength


class ModelMethods(AdapterMethods):
    """Replacements for the adapter methods of one model."""

    served = (
        "active_adapters",
        "set_adapters",
        "set_adapter",
        "disable_adapters",
        "enable_adapters",
        "disable_lora",
        "enable_lora",
        "delete_adapters",
        "delete_adapter",
        "unload_lora",
        "fuse_lora",
        "unfuse_lora",
        "save_lora_adapter",
        "get_adapter_state_dict",
    )
    call = "diffadapt.adapters(model)"

    @staticmethod
    def models_of(owner: Any) -> list[nn.Module]:
        return [owner]

    def active_adapters(self) -> list[str]:
        # With peft in the model, transformers saves what this returns.
        return self.theirs("active_adapters") or list(self.adapters().active)

    def activate(self, strengths: Mapping[str, Strength]) -> None:
        if strengths:
            super().activate(strengths)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        self._set(adapter_names, weights)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        names, adapters = names_in(adapter_name), self.adapters()
        others = [name for name in names if self._is_only_theirs(name)]
        # The method of peft leaves strengths alone.
        self.activate({name: adapters.active.get(name, 1.0) for name in names if name not in others})
        if others:
            self.theirs("set_adapter", others if len(others) > 1 else others[0])

    def disable_adapters(self) -> None:
        self._disable()
        self.theirs("disable_adapters")

    def enable_adapters(self) -> None:
        self._enable()
        self.theirs("enable_adapters")

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        others = self._remove(names_in(adapter_names))
        if others:
            self.theirs("delete_adapter", others)

    def unload_lora(self) -> None:
        self.adapters().clear()
        self.theirs("unload_lora")

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        others = self._fuse(lora_scale, adapter_names)
        if others is None or others:
            self.theirs("fuse_lora", lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=others)

    def unfuse_lora(self) -> None:
        self.adapters().unmerge()
        self.theirs("unfuse_lora")

    def save_lora_adapter(self, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> None:
        self._refuse_to_save("save_lora_adapter", adapter_name)
        self.theirs("save_lora_adapter", save_directory, adapter_name, *args, **kwargs)

    def get_adapter_state_dict(self, adapter_name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        self._refuse_to_save("get_adapter_state_dict", adapter_name)
        return self.theirs("get_adapter_state_dict", adapter_name, *args, **kwargs)

    def _refuse_to_save(self, method: str, name: str | None) -> None:
        adapters = self.adapters()
        if name in adapters or not getattr(self.owner, "peft_config", None):
            own = name if name in adapters else next(iter(adapters), "name")
            raise AdapterError(
                f"{method}: peft has no adapter {name!r} in this model; "
                f'{self.call}.save({own!r}, "{own}.safetensors") saves one of diffadapt'
            )
