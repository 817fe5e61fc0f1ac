"""The shim: it finds upstream classes, wraps their methods and restores them, without Triton."""
