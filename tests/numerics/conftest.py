import pytest


@pytest.fixture(autouse=True)
def fast(shapes_unchecked):
    """Thousands of steps a test: tests/flow checks the shapes of the same calls."""
