"""Check the names in FLASHBIAS_TARGETS, FLASHBIAS_COMPAT and FLASHBIAS_AQR.

The valid names are defined in the catalog, the compatibility patches and the options of the router,
which `settings` does not import. None of these modules imports torch: this check may run while
torch itself is being imported. Targets of third-party packages may import torch.
"""

from __future__ import annotations

from typing import Iterable, List

from . import settings


def problems() -> List[str]:
    """Return one message per variable that names something unknown."""
    read = settings.current()
    messages: List[str] = []
    if read.targets:
        from .patching import catalog

        names = [name[1:].strip() if name.startswith("-") else name for name in read.targets]
        messages += _unknown("FLASHBIAS_TARGETS", "class to patch", names, catalog.targets())
    if read.compat != ("all",):
        from . import compat

        names = [name for name in read.compat if name.lower() not in (*compat.SWITCHES,)]
        messages += _unknown(
            "FLASHBIAS_COMPAT", "patch", names, ["all", "none", *(p.name for p in compat.PATCHES)]
        )
    if read.aqr and read.aqr.lower() not in settings.TRUE + settings.FALSE:
        from .aqr import options

        try:
            options.from_environment()
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


def loads_third_parties() -> bool:
    """Return True if `problems` imports third-party packages."""
    if not settings.current().targets:
        return False
    import importlib.metadata

    from .patching import catalog

    found = importlib.metadata.entry_points()
    select = getattr(found, "select", None)  # Python 3.10 and later
    return bool(
        select(group=catalog.ENTRY_POINT_GROUP) if select else found.get(catalog.ENTRY_POINT_GROUP)
    )


def _unknown(variable: str, noun: str, names: Iterable[str], known: Iterable[str]) -> List[str]:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return []
    near = {name: settings.nearest(name, known) for name in unknown}
    listed = ", ".join(
        f"{name or repr(name)} (the nearest is {near[name]})" if near[name] else name or repr(name)
        for name in unknown
    )
    return [f"{variable}: no {noun} is called {listed}; there are {', '.join(known)}"]
