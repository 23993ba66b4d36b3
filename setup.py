"""What deepspec needs; pyproject.toml says the rest. The version bounds are those that the tests ran with."""

from setuptools import setup
from setuptools.command.build_py import build_py

CORE = [
    "torch>=2.9,<2.15",
    "deepspeed>=0.19,<0.20",
    "transformers>=5.17,<6",
    "datasets>=4.0,<6",
    "zarr>=3.1.6,<4",
    "numcodecs>=0.16.3,<0.17",
    "zstandard>=0.23,<1",
    "safetensors>=0.5,<1",
    "pyyaml>=6,<7",
    "mpi4py>=4,<5",
    "numpy>=2,<3",
    "google-crc32c>=1.5,<2",
    "fsspec>=2024.6",
    "jinja2>=3.1,<4",
    "tensorboard>=2.18,<3",
    "matplotlib>=3.9,<4",
    "huggingface-hub>=1.0,<3",
    "tokenizers>=0.22,<1",
    "pyarrow>=17",
    "psutil>=5.9,<8",
    "regex>=2024.11.6",
    "httpx2>=2,<3",
    "shtab>=1.7,<2",
]
LLAMACPP = ["gguf>=0.19,<0.20", "xllamacpp>=2026.10"]  # drafts as GGUF; a whole llama.cpp server
SERVE = ["starlette>=0.40,<2", "uvicorn>=0.30,<1"]  # `deepspec serve-features`
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29,<2"]
DEV = [
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "ruff>=0.12,<0.18",
    "mypy>=1.15,<3",
    "import-linter>=2.3,<3",
    "types-PyYAML>=6,<7",
    "pre-commit>=4,<5",
    *LLAMACPP,
    *SERVE,
    *DOCS,
]

SHARED = ("recipes", "deepspeed_configs")  # at the top of the checkout; deepspec/recipe_files.py finds them in both


class BuildWithShared(build_py):
    """Puts SHARED into the package as deepspec/share/; an editable install reads them where they are."""

    def run(self) -> None:
        """Copy the package, then SHARED."""
        super().run()
        if not self.editable_mode:
            for name in SHARED:
                self.copy_tree(name, f"{self.build_lib}/deepspec/share/{name}")


setup(
    cmdclass={"build_py": BuildWithShared},
    install_requires=CORE,
    extras_require={
        "dev": DEV,
        "docs": DOCS,
        "llamacpp": LLAMACPP,
        "browser": ["playwright>=1.50,<2"],
        "mpi": ["mpich>=5,<6"],
        "serve": SERVE,
        "s3": ["s3fs>=2024.6"],
        "wandb": ["wandb>=0.19"],
    },
)
