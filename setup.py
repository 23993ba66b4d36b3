"""For tools that still call it; pyproject.toml says everything."""

from setuptools import setup

setup()
