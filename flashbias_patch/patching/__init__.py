"""The shim: where upstream classes are found, wrapped and put back. Knows nothing of Triton."""
