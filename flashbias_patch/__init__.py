"""FlashBias attention for unmodified CMT / PETR-family code. Importing this package installs the
patches, unless FLASHBIAS_PATCH is 0, false, off, no, none or disabled. Imports neither torch nor
mmcv nor triton.
"""

from __future__ import annotations

from . import settings, telemetry
from ._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

    from . import aqr, bias, maps, monitor
    from .attention import flash_bias_attention
    from .maps import attention_map
    from .patching.context import attention_bias
    from .patching.install import install, uninstall
    from .status import status

# Public name -> its module. Names are loaded on first use (PEP 562), so that importing this package
# stays cheap.
_FUNCTIONS = {
    "install": ".patching.install",
    "uninstall": ".patching.install",
    "status": ".status",
    "attention_bias": ".patching.context",
    "attention_map": ".maps",
    "flash_bias_attention": ".attention",
}
_MODULES = ("aqr", "bias", "maps", "monitor")

__all__ = [
    "__version__",
    "aqr",
    "attention_bias",
    "attention_map",
    "bias",
    "flash_bias_attention",
    "install",
    "maps",
    "monitor",
    "status",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_FUNCTIONS.get(name, f".{name}"), __name__)
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(__all__)


def _install_on_import() -> None:
    read = settings.current()
    telemetry.configure(read.log_level)
    if read.patch:
        telemetry.environment(read.problems + read.unknown)
        from .patching import deferred_install

        deferred_install.arm()


_install_on_import()
