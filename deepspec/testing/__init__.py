"""Conformance suites as pytest classes: subclass one in a test file, for an algorithm, target, source or engine."""

import pytest

SUITES = ("case", "drafter", "engine", "source", "target")
pytest.register_assert_rewrite(*(f"deepspec.testing.{name}" for name in SUITES))
