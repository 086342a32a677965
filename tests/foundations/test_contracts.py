"""Tests of the import contracts of pyproject.toml: all hold, and each detects the import that it forbids."""

import copy
from functools import cache
from graphlib import TopologicalSorter

import grimp
import pytest
from importlinter.api import read_configuration
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract

KINDS = {"forbidden": ForbiddenContract, "layers": LayersContract}
# contract, by a word of its name -> imports that break it: who imports, and what
BROKEN_BY = {
    "layers": [
        ("pi0fm.flow.path", "pi0fm.models.pi0"),
        ("pi0fm.policy.local", "pi0fm.train.step"),
        ("pi0fm.serve.app", "pi0fm.eval.rollouts.rollout"),
        ("pi0fm.bench.inference", "pi0fm.cluster.training"),
        ("pi0fm.options", "pi0fm.data.prompt"),
    ],
    "ray": [("pi0fm.train.loop", "ray"), ("pi0fm.cli.training.train", "ray")],
    "accelerate": [("pi0fm.train.loop", "accelerate")],
    "lerobot": [("pi0fm.convert.lerobot", "lerobot"), ("pi0fm.data.loading.loader", "lerobot")],
    "simulators": [("pi0fm.eval.rollouts.rollout", "mujoco"), ("pi0fm.demos.demonstration", "metaworld")],
    "shared nouns": [("pi0fm.files", "torch"), ("pi0fm.cli.main", "ray"), ("pi0fm.options", "pi0fm.models.pi0")],
    "robot's client": [("pi0fm_client.client", "torch"), ("pi0fm_client.wire", "pi0fm.files")],
}


@cache
def graph() -> grimp.ImportGraph:
    """Who imports whom; a test copies it before it adds an import."""
    return grimp.build_graph("pi0fm", "pi0fm_client", include_external_packages=True, cache_dir=None)


def test_no_import_leads_in_a_circle():
    """Imports for type checkers alone are not counted; CycleError names the modules of a circle."""
    plain = grimp.build_graph("pi0fm", "pi0fm_client", cache_dir=None, exclude_type_checking_imports=True)
    TopologicalSorter({module: plain.find_modules_directly_imported_by(module) for module in plain.modules}).prepare()


@cache
def contracts(repository):
    """By the word of BROKEN_BY that its name, or its kind, has."""
    read = read_configuration(str(repository / "pyproject.toml"))
    session = {"root_packages": ["pi0fm", "pi0fm_client"], **read["session_options"]}
    found = {}
    for options in read["contracts_options"]:
        words = [word for word in BROKEN_BY if word in options["name"] and (word != "ray" or "ray enters" in options["name"])]
        assert len(words) == 1, f"{options['name']!r} has no import here that breaks it"
        found[words[0]] = KINDS[options["type"]](name=options["name"], session_options=session, contract_options=options)
    return found


def test_every_contract_has_an_import_that_breaks_it(repository):
    assert contracts(repository).keys() == BROKEN_BY.keys()


@pytest.mark.parametrize("word", BROKEN_BY)
def test_the_contract_holds(repository, word):
    assert contracts(repository)[word].check(copy.deepcopy(graph()), verbose=False).kept


@pytest.mark.parametrize(("word", "importer", "imported"), [(word, *pair) for word, pairs in BROKEN_BY.items() for pair in pairs])
def test_the_contract_sees_an_import_that_breaks_it(repository, word, importer, imported):
    changed = copy.deepcopy(graph())
    assert importer in changed.modules
    if not imported.startswith("pi0fm"):
        changed.add_module(imported, is_squashed=True)  # as the graph has what lies outside; nobody may import it yet
    changed.add_import(importer=importer, imported=imported, line_number=1, line_contents=f"import {imported}")
    assert not contracts(repository)[word].check(changed, verbose=False).kept
