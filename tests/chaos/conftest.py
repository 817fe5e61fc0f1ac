from ..patching.conftest import patched, repository  # noqa: F401
