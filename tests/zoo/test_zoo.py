"""Runs the checks of checks.py for every architecture of the zoo."""

import re
import traceback
import warnings

import checks
import pytest
import table
from entry import Entry
from text import ENTRIES as TEXT

try:
    from others import ENTRIES as OTHERS
except ImportError:
    OTHERS = ()

ENTRIES = (*TEXT, *OTHERS)


def steps(entry: Entry):
    """Names and functions of the checks that an entry needs, in order."""
    yield "sites", checks.check_sites
    if entry.refused and entry.refused[1] == 0:
        return
    yield "step 0", checks.check_step0
    yield "shapes", checks.check_shapes
    yield "gradients", checks.check_gradients
    for way in entry.generate:
        yield f"generate {way}", lambda case, way=way: checks.check_generate(case, way)
    yield "training", checks.check_training
    yield "reference", checks.check_reference
    for way in entry.generate:
        yield f"cache {way}", lambda case, way=way: checks.check_cache(case, way)


@pytest.mark.zoo
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: re.sub(r"\W+", "-", entry.name))
def test_entry(entry: Entry) -> None:
    warnings.simplefilter("ignore")
    case, results, errors = None, {}, []
    try:
        case = checks.new_case(entry)
        for name, check in steps(entry):
            try:
                check(case)
                results[name] = "ok"
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}".split("\n")[0]
                errors.append(f"--- {name}\n{traceback.format_exc()}")
                if name in ("sites", "step 0") and case.model is None and name == "step 0":
                    break
    finally:
        table.write_row(entry, results, case.measured if case else {})
    assert not errors, "\n".join(errors)
