import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def shapes_unchecked():
    """Thousands of steps a test: tests/flow checks the shapes of the same calls, and here the looking would cost most of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
