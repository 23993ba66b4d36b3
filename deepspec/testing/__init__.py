"""Conformance suites as pytest classes: subclass one in a test file to check an algorithm or a source of your own."""

import pytest

pytest.register_assert_rewrite("deepspec.testing.case", "deepspec.testing.drafter", "deepspec.testing.source")
