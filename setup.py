"""Packaging of flashbias_patch. Tool settings live in pyproject.toml."""

import pathlib
import re
from typing import Dict, List, Tuple

from setuptools import find_namespace_packages, setup

ROOT = pathlib.Path(__file__).parent
(VERSION,) = re.findall(
    r'^__version__ = "([^"]+)"',
    (ROOT / "flashbias_patch" / "_version.py").read_text(),
    re.MULTILINE,
)

REPORT = ["rich>=12", "jinja2>=3", "numpy", "scipy"]
TEST = REPORT + [
    "pytest>=7",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
    "opencv-python-headless",
    "matplotlib",
    "tensorboard",
    *(f"{name}; python_version>='3.10'" for name in ("onnx", "onnxruntime", "onnxscript")),
]
LINT = ["ruff>=0.17.6,<0.18", "mypy>=2.4,<2.5"]  # others may format or judge otherwise
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff"]  # ruff wraps the signatures

# What README.md links to, beside the package: a wheel puts it into share/doc/flashbias-patch of the
# environment.
DOCUMENTS = (
    "LICENSE",
    "*.md",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/**/*.svg",
    "sitecustomize_example/*",
    "examples/**/*.md",
    "examples/**/*.py",
    "examples/**/*.sh",
    "benchmarks/results/order_h200.json",
)


def documents() -> List[Tuple[str, List[str]]]:
    """(folder in the environment, files) for each folder that holds one of DOCUMENTS."""
    folders: Dict[pathlib.PurePosixPath, List[pathlib.Path]] = {}
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix != ".pyc":
                place = path.relative_to(ROOT)
                folders.setdefault(
                    pathlib.PurePosixPath("share/doc/flashbias-patch", place.parent), []
                ).append(place)
    return [(str(folder), [str(place) for place in places]) for folder, places in folders.items()]


setup(
    name="flashbias-patch",
    version=VERSION,
    description="FlashBias attention for unmodified CMT / PETR-family 3D detectors, by "
    "monkey-patching",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.8",
    packages=find_namespace_packages(
        include=["flashbias_patch", "flashbias_patch.*"], exclude=["*.__pycache__"]
    ),
    package_data={
        "flashbias_patch": ["py.typed"],
        "flashbias_patch.ab.templates": ["*.j2", "*.js", "*.css"],
    },
    data_files=documents(),
    install_requires=["wrapt>=1.14"],
    extras_require={
        "triton": ["triton>=3.0"],  # the fused kernel, where torch came without Triton
        "fa4": [
            "flash-attn-4>=4.0.0b36; python_version>='3.10'"
        ],  # FlashAttention-4 as a further backend
        "report": REPORT,  # `flashbias ab`: tables and HTML reports
        "tensorboard": ["tensorboard"],  # export of reports and of the parameter monitor
        "nuscenes": ["nuscenes-devkit"],  # mAP and NDS in `flashbias ab --eval`
        "demo": REPORT + ["opencv-python-headless"],  # examples/mini_cmt
        "test": TEST,
        "lint": LINT,
        "docs": DOCS,
        "dev": TEST + LINT + ["pre-commit"],
    },
    entry_points={"console_scripts": ["flashbias = flashbias_patch.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
