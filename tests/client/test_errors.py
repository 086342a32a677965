"""Tests that errors survive pickling: Ray sends them from a worker to the driver."""

import inspect
import pickle

import pytest

from pi0fm_client import errors

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.Pi0fmError)]


def test_there_is_a_class_for_every_kind_of_input() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert names >= {"ConfigError", "DatasetError", "BundleError", "SimulationError", "OutputError", "ObservationError", "ServingError"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_class_and_message(cls: type[errors.Pi0fmError], protocol: int) -> None:
    error = cls("a rule, found 3, type --steps 4")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is cls
    assert str(again) == str(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_caught_as_one(cls: type[errors.Pi0fmError]) -> None:
    with pytest.raises(errors.Pi0fmError, match=r"^found nothing$"):
        raise cls("found nothing")
