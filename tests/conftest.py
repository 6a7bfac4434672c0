"""What holds for all tests."""
import os, signal
import pytest

# a shell that starts `make test` in the background has it ignore SIGINT, and every process below inherits that: tests that interrupt would fail
signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(scope="session")
def many(): # `many(10_000)`: that many in `make soak`, a fifth of them in `make test`
    return lambda n: n if os.environ.get("CLAM_SOAK") else n//5

def pytest_collection_modifyitems(items):
    for i in items:
        if i.get_closest_marker("soak_only") and not os.environ.get("CLAM_SOAK"): i.add_marker(pytest.mark.skip(reason="only in `make soak`"))
