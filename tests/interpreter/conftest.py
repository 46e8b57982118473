"""Fixtures of the tests that run in Triton's interpreter."""

import pytest


@pytest.fixture(autouse=True)
def limits_that_tests_change():
    """Tables of tiles answer anew in each test, for some of them change what limits tiles."""
    # Here: this file is also read where Triton is not installed.
    from dsnet_kernels.triton.launch import forget_tables

    forget_tables()
    yield
    forget_tables()
