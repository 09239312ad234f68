"""Runs the checks of checks.py on every architecture of the zoo.

`make test` runs those of QUICK, `make zoo` all of them.
"""

import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator

import checks
import pytest
import table
import torch
from entry import Entry
from text import ENTRIES as TEXT

try:
    from others import ENTRIES as OTHERS
except ModuleNotFoundError:
    OTHERS = ()

ENTRIES = (*TEXT, *OTHERS)
QUICK = ("sites", "refused", "step 0", "training", "reference")
REPRESENTATIVE = frozenset({
    "GPT-NeoX parallel", "Gemma2", "Granite", "OPT", "DeepSeek-V3", "Mamba", "Jamba", "ALBERT",
    "BART", "DINOv2", "Swin", "CLIP", "Whisper", "wav2vec2", "Llava", "Stable Diffusion 3",
    "U-ViT", "residuals in the root",
})  # fmt: skip


def steps(entry: Entry) -> Iterator[tuple[str, checks.Check]]:
    """Names and functions of the checks that an entry needs, in order."""
    yield "sites", checks.check_sites
    if not entry.sites:
        yield "refused", checks.check_refused
        return
    yield "step 0", checks.check_step0
    yield "shapes", checks.check_shapes
    yield "gradients", checks.check_gradients
    for way in entry.generate:
        yield f"generate {way}", lambda case, way=way: checks.check_generate(case, way)
    yield "training", checks.check_training
    yield "recompute", checks.check_recompute
    if not entry.no_reference:
        yield "reference", checks.check_reference
    for way in entry.generate:
        differs = way in checks.CACHE_DIFFERS.get(entry.name, ())
        check = checks.check_library_differs if differs else checks.check_cache
        name = "library's cache differs" if differs else "cache"
        yield f"{name} {way}", lambda case, way=way, check=check: check(case, way)


def by_name(entry: Entry) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", entry.name)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.name in REPRESENTATIVE], ids=by_name)
def test_entry_quickly(entry: Entry) -> None:
    warnings.simplefilter("ignore")
    case = checks.new_case(entry)
    for name, check in steps(entry):
        if name in QUICK:
            check(case)


@pytest.mark.zoo
@pytest.mark.parametrize("entry", ENTRIES, ids=by_name)
def test_entry(entry: Entry) -> None:
    """All checks; one that fails does not keep the others from running."""
    warnings.simplefilter("ignore")
    case = checks.new_case(entry)
    results, errors = {}, []
    for name, check in steps(entry):
        try:
            check(case)
            results[name] = "ok"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}".split("\n")[0]
            errors.append(f"--- {name}\n{traceback.format_exc()}")
            if name == "step 0" and case.model is None:
                break
    table.write_row(entry, results, case.measured)
    assert not errors, "\n".join(errors)


def test_names_are_unique() -> None:
    counts = Counter(by_name(entry) for entry in ENTRIES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_table_in_docs_is_that_of_the_entries() -> None:
    """docs/zoo.md is generated; `make zoo` writes it anew."""
    families = dict.fromkeys(entry.family for entry in ENTRIES)
    stated = [
        (entry.name, table.sites_text(entry))
        for family in families
        for entry in ENTRIES
        if entry.family == family
    ]
    assert table.stated_in(table.TABLE.read_text()) == stated
    assert "FAILS" not in table.TABLE.read_text()


def test_every_exception_to_the_cache_check_is_an_entry() -> None:
    ways = {entry.name: entry.generate for entry in ENTRIES}
    for name, differing in checks.CACHE_DIFFERS.items():
        assert set(differing) <= set(ways[name]), name


@pytest.mark.parametrize("change", ["phi", "alpha", "bias", "collapse.weight"])
def test_the_reference_can_fail(change: str) -> None:
    """Other connections than the model's own give another result."""
    entry = next(entry for entry in ENTRIES if entry.name == "Llama")
    case = checks.new_case(entry)
    checks.check_sites(case)
    checks.check_step0(case)
    checks.check_reference(case)
    name = next(k for k, _ in checks.mc.mhc_parameters(case.model) if k.endswith(change))
    wanted = checks.reference_of(case)
    with torch.no_grad():
        parameter = case.model.get_parameter(name)
        parameter.add_(0.01 * torch.randn_like(parameter))  # a factor would fall to the last norm
    got = case.run(case.model, checks.reference_inputs(case))
    with pytest.raises(AssertionError, match="differs by"):
        case.close("reference", got, wanted, checks.REFERENCE)
