"""Conformance suites as pytest classes: subclass one in a test file, for an algorithm, a target, a source or an engine."""

import pytest

pytest.register_assert_rewrite(*(f"deepspec.testing.{name}" for name in ("case", "drafter", "engine", "source", "target")))
