"""Record how loading a checkpoint changes the watched parameters."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple

from .subjects import matching

MOST_LOADS = 200


class Load(NamedTuple):
    """One parameter that a checkpoint was loaded into.

    facts: key, found (whether the checkpoint has the key), before and after (the first entries),
    step (number of optimizer steps before).
    """

    parameter: Any
    facts: Dict[str, Any]


LOADS: List[Load] = []


def around(original: Any, observer: Any) -> Any:
    """Wrap nn.Module._load_from_state_dict so that `observer` records the loads in LOADS."""

    def _load_from_state_dict(
        module: Any, state_dict: Any, prefix: Any, *args: Any, **kwargs: Any
    ) -> Any:
        watched = {}
        if not observer.done:
            watched = {
                name: parameter
                for name, parameter in module._parameters.items()
                if matching(prefix + name, observer.patterns)
            }
        before = {name: _first_entries(parameter) for name, parameter in watched.items()}
        result = original(module, state_dict, prefix, *args, **kwargs)
        try:
            for name, parameter in watched.items():
                if parameter is not None and len(LOADS) < MOST_LOADS:
                    facts = {
                        "key": prefix + name,
                        "found": prefix + name in state_dict,
                        "before": before[name],
                        "after": _first_entries(module._parameters[name]),
                        "step": observer.steps,
                    }
                    LOADS.append(Load(parameter, facts))
        except Exception as error:
            observer.note_error(error)
        return result

    return _load_from_state_dict


def _first_entries(parameter: Any) -> Any:
    """Return the first entries as floats; a single float for a parameter of one entry."""
    if parameter is None:
        return None
    flat = parameter.detach().double().flatten()[:4].tolist()
    return flat[0] if len(flat) == 1 else flat
