from __future__ import annotations

import pytest

from . import family


@pytest.fixture
def claimed(installed):
    """The stand-ins, wrapped."""
    from flashbias_patch.patching import install

    for cls in family.CLASSES:
        assert install.claim(cls), cls
    return family
