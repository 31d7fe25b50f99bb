"""The order of these tests: by model, so that what tests of one share is made once, and by one process."""

from pathlib import Path

from tests.zoo.registry import MODELS

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    places = [place for place, item in enumerate(items) if item.path.parent == FOLDER]
    order = {name: number for number, name in enumerate(MODELS)}
    ordered = sorted((items[place] for place in places), key=lambda item: order.get(model_of(item), -1))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def model_of(item):
    """The name of the model that a test is about, if it is about one of them."""
    called = getattr(item, "callspec", None)
    return called.params.get("name") if called else None
