"""The checker of annotations that tests/conftest.py puts on every function of pi0fm."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int passes for a float, as in PEP 484. `Self` is not checked: functions are decorated one by one, without their class.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any})))
