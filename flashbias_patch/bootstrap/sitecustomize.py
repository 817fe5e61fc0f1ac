"""Put on PYTHONPATH by `flashbias run` and `flashbias ab`. All logic lives in flashbias_patch.launch."""
try:
    from flashbias_patch import launch
except ImportError:  # another Python of the same command, without the package: none of our business
    launch = None  # type: ignore[assignment]

if launch is not None:
    launch.start_process(__file__)
