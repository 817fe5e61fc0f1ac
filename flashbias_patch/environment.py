"""Problems with names that FLASHBIAS_TARGETS, FLASHBIAS_COMPAT and FLASHBIAS_AQR hold.

They are known only to the catalog, the compatibility patches and the router's options, which
`settings` does not import. None of them imports torch, whose own import may be what waits for this;
a third party's targets may.
"""

from __future__ import annotations

from typing import Iterable, List

from . import settings


def problems() -> List[str]:
    """One message per variable that names something unknown."""
    read = settings.current()
    found: List[str] = []
    if read.targets:
        from .patching import catalog

        names = [name[1:] if name.startswith("-") else name for name in read.targets]
        found += _unknown("FLASHBIAS_TARGETS", "class to patch", names, catalog.targets())
    if read.compat != ("all",):
        from . import compat

        names = [name for name in read.compat if name.lower() not in (*compat.SWITCHES,)]
        found += _unknown(
            "FLASHBIAS_COMPAT", "patch", names, ["all", "none", *(p.name for p in compat.PATCHES)]
        )
    if read.aqr and read.aqr.lower() not in settings.TRUE + settings.FALSE:
        from .aqr import options

        try:
            options.from_environment()
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def loads_third_parties() -> bool:
    """Whether `problems` imports a third party's package."""
    if not settings.current().targets:
        return False
    import importlib.metadata

    from .patching import catalog

    found = importlib.metadata.entry_points()
    select = getattr(found, "select", None)  # Python 3.10 and later
    return bool(
        select(group=catalog.ENTRY_POINT_GROUP) if select else found.get(catalog.ENTRY_POINT_GROUP)
    )


def _unknown(variable: str, what: str, given: Iterable[str], known: Iterable[str]) -> List[str]:
    bad = [name for name in given if name not in known]
    if not bad:
        return []
    near = {name: settings.nearest(name, known) for name in bad}
    named = ", ".join(
        f"{name} (the nearest is {near[name]})" if near[name] else name for name in bad
    )
    return [f"{variable}: no {what} is called {named}; there are {', '.join(known)}"]
