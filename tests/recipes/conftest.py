"""`python -m pytest tests/recipes --refresh-twins` writes the resolved twins anew, for a change of recipes or defaults
that is meant."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-twins", action="store_true", help="write tests/recipes/resolved/*.yaml anew")


@pytest.fixture
def refresh_twins(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--refresh-twins", default=False)
