"""For tools that look for this file: pyproject.toml says everything."""

from setuptools import setup

setup()
