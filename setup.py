"""Packaging: the repository root is the package `elsewhere`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithoutSetup(build_py):
    """Leave setup.py out of the root package, where a wheel would otherwise carry it as a module."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if (found[0], found[1]) != ("elsewhere", "setup")]


ROOMS = [
    "",
    ".launch",
    ".launch.engine",
    ".launch.evaluate",
    ".launch.exchange",
    ".launch.nodes",
    ".launch.planning",
    ".launch.report",
    ".models",
    ".kernels",
    ".data",
]

setup(
    name="elsewhere",
    version="0.1.0",
    description="Masked-image pre-training of vision transformers with stochastic and adversarial positions",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["elsewhere" + room for room in ROOMS],
    package_dir={"elsewhere": "."},
    package_data={"elsewhere": ["configs/*.yaml", "configs/published/*.yaml", "ds_configs/*", "launch/report/page.*"]},
    cmdclass={"build_py": BuildWithoutSetup},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",  # torch's own version of it, where torch brings one
        "timm>=1.0.21",
        "deepspeed>=0.19.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "pydantic>=2.7",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "scikit-learn>=1.5",
        "simplejpeg>=1.8",
        "tensorboard>=2.16",
        "webdataset>=1.0.2",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "psutil>=5.9",
            "hypothesis>=6.100",
            "transformers>=4.45",
            "huggingface_hub>=0.24",
            "build>=1.2",
            "setuptools>=70.1",
            "tifffile>=2024.1",
            "pycocotools>=2.0.8",
        ],
        "detect": ["pycocotools>=2.0.8"],
        # setuptools: FFCV builds with it, and imports distutils when it runs, which Python left to it.
        "ffcv": ["ffcv>=1.0.2", "setuptools>=70.1"],
        "report": ["matplotlib>=3.8"],
        "wandb": ["wandb>=0.18"],
        "tiff": ["tifffile>=2024.1"],
        "docs": ["mkdocs-material>=9.5", "latex2mathml>=3.77"],
        "lint": ["ruff>=0.9", "pyright>=1.1.390"],
    },
    entry_points={"console_scripts": ["elsewhere = elsewhere.launch.cli:main"]},
)
