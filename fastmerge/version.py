"""fastmerge's version: every output and every journal's key holds it; pyproject.toml reads it."""

__version__ = "0.1.0"
