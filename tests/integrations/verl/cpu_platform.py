"""A CPU platform for verl, which ships those of accelerators: importing this sets it, before anything else of verl."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._init_utils as fsdp
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform


def _device_module() -> SimpleNamespace:
    """``torch.cpu`` with what verl asks of ``torch.cuda``."""
    module = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    module.__name__ = "torch.cpu"
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(module, name, lambda *_, **__: None)
    module.mem_get_info = lambda *_, **__: (0, 0)
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    module.get_rng_state, module.set_rng_state = torch.get_rng_state, torch.set_rng_state
    module.get_device_name = lambda *_, **__: "cpu"
    return module


class _Here(str):
    """The CPU as a device, and as its number: verl writes both ``tensor.to(here)`` and ``f"cpu:{here}"``."""

    def __format__(self, specification: str) -> str:
        return "0"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return _Here("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        # That which `ray.init(num_gpus=...)` gives a machine without any.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


set_platform(PlatformCPU())

_init_process_group = dist.init_process_group


def _one_backend(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    # verl names one for the CPU and one for the device.
    _init_process_group("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


dist.init_process_group = _one_backend  # type: ignore[assignment]
# FSDP1 refuses to send the first rank's parameters to the others on a CPU; every rank has loaded the same.
fsdp._check_module_states_for_sync_module_states = lambda module_states: None  # type: ignore[attr-defined]
# FSDP2 pins what it keeps on the host, as verl wants it of a reference, and there is no accelerator to pin it for.
torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
