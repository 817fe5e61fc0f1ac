"""Packaging of flashbias_patch. Tool settings live in pyproject.toml."""
import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "flashbias_patch" / "__init__.py").read_text(), re.MULTILINE
).group(1)

REPORT = ["rich>=12", "jinja2>=3", "numpy", "scipy"]

setup(
    name="flashbias-patch",
    version=VERSION,
    description="FlashBias attention for unmodified CMT / PETR-family 3D detectors, by monkey-patching",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.8",
    packages=find_packages(include=["flashbias_patch", "flashbias_patch.*"]) + ["flashbias_patch.bootstrap"],
    include_package_data=True,
    package_data={"flashbias_patch": ["py.typed"], "flashbias_patch.ab": ["templates/*"]},
    install_requires=["wrapt>=1.14"],
    extras_require={
        "triton": ["triton>=3.0"],
        "fa4": ["flash-attn-4>=4.0.0b36; python_version>='3.10'"],
        "report": REPORT,
        "tensorboard": ["tensorboard"],
        "nuscenes": ["nuscenes-devkit"],
        "demo": REPORT + ["opencv-python-headless"],
        "test": REPORT + ["pytest>=7", "pytest-xdist", "pytest-timeout", "hypothesis",
                          "opencv-python-headless", "matplotlib", "tensorboard"],
        "lint": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["flashbias = flashbias_patch.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
