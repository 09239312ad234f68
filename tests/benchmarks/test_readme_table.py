"""The README's measurements: only what files say, between the marks, and nothing without files."""

import json

import pytest
import readme_table
from readme_table import BEGIN, END, README, main

SETTING = {
    "model": "dense", "channels": 64, "blocks": 2, "batch": 1, "length": 16, "streams": 4,
    "graph": False, "sweep": False, "dtype": "bf16", "steps": 500, "seeds": 4,
    "tokens": 8, "hidden": 64, "gpu": "a GPU", "driver": "1.2", "torch": "3.4", "triton": "5.6",
}  # fmt: skip
MS = {"median": 4.0, "low": 3.9, "high": 4.2}
STEP = {"status": "ok", "step ms": MS, "forward and backward ms": MS, "peak bytes": 3 * 2**30}
SLOW = {"median": 5.0, "low": 4.9, "high": 5.2}
FILES = {
    "steps": {
        "flops": 1.0, "shape": {"batch": 1, "length": 16},
        "rows": {"plain": STEP, "mhc": STEP | {"step ms": SLOW}, "hc": {"status": "failed: why"}},
    },
    "memory": {
        "rows": [
            {"status": "ok", "streams": 1, "recompute": "plain", "measured": 2**30, "ms": MS},
            {"status": "ok", "streams": 4, "recompute": "paper", "measured": 2**31, "ms": MS,
             "predicted": 2**30, "blocks": [[2, 1, 1]]},
        ]
    },
    "seam": {
        "sizes": [{
            "tokens": 8, "hidden": 64, "streams": 4,
            "rows": {
                "ours": {"status": "ok", "forward us": 10.0, "both us": 30.0,
                         "forward of copy": 0.5, "both of copy": 0.25},
                "theirs": {"status": "not installed"},
            },
        }]
    },
    "kernels": {
        "copy_bytes_per_us": 3e6,
        "kernels": [{"kernel": "mix", "us": 123.45, "bytes": 678900000, "of copy": 0.98}],
    },
    "pipeline": {
        "ranks": 2,
        "rows": {
            "plain": {"status": "ok", "step ms": 400.0, "times ms": [390.0, 410.0], "error": 1e-9,
                      "predicted ms": 500.0, "predicted idle ms": 7.0, "peak GiB": 1.5},
            "mhc": {"status": "not run"},
        },
    },
    "data": {
        "ranks": 2,
        "rows": {
            "ddp: plain": {"status": "ok", "step ms": 10.0, "peak GiB": 1.0, "error": 0.0},
            "ddp: mhc": {"status": "ok", "step ms": 11.5, "peak GiB": 2.5, "error": 0.0},
            "fsdp: mhc": {"status": "wrong"},
        },
    },
    "check": {"compared": {"difference": 1e-3, "standard error": 2e-3}, "differs": ""},
}  # fmt: skip


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def written(tmp_path, name):
    path = tmp_path / f"{name}.json"
    own = {"microbatches": 8} if name == "pipeline" else {}
    path.write_text(json.dumps({"setting": SETTING | own, **FILES[name]}))
    return str(path)


def test_all_kinds(tmp_path, page):
    main([*(written(tmp_path, name) for name in FILES), "--page", str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text and "a GPU, driver 1.2, torch 3.4, triton 5.6" in text
    assert "| mhc" in text and "1.250" in text and "3,200" in text and "failed: why" in text
    assert "2, 1, 1" in text and "2.00" in text
    assert "0.25" in text and "theirs" not in text
    assert "| mix " in text and "123.5" in text and "678.9" in text and "3.00 TB/s" in text
    assert "differ by +0.0010 on average" in text and "equal in every bit" in text
    assert "400 (390 to 410)" in text and "0.80" in text and "not run" in text
    assert "1.150" in text and "2.5" in text and "wrong" in text
    main([written(tmp_path, "check"), "--page", str(page)])  # again: the section is replaced
    assert "| mhc" not in page.read_text() and page.read_text().count(BEGIN) == 1


def test_a_sweep_has_a_row_for_each_width(tmp_path, page):
    ours = FILES["seam"]["sizes"][0]["rows"]["ours"]
    sizes = [
        {"tokens": tokens, "hidden": hidden, "streams": 4,
         "rows": {"plain residual": ours | {"forward us": 77.0}, "ours": row}}
        for tokens, hidden, row in ((8, 64, ours), (1, 64, {"status": "wrong"}), (8, 32, ours))
    ]  # fmt: skip
    sizes.append({"tokens": 1, "hidden": 32, "streams": 4, "rows": {"plain residual": ours}})
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"setting": SETTING | {"sweep": True}, "sizes": sizes}))
    main([str(path), "--page", str(page)])
    text = page.read_text()
    assert "One seam by ours" in text and "77" not in text
    lines = [line.replace(" ", "") for line in text.splitlines()]
    for line in ("|n|C|1token|8tokens|", "|4|32|notrun|10/30(0.50,0.25)|",
                 "|4|64|wrong|10/30(0.50,0.25)|"):  # fmt: skip
        assert line in lines


def test_without_files_nothing_changes(page, capsys):
    before = page.read_text()
    main(["--page", str(page)])
    main(["none.json", "--page", str(page)])
    assert page.read_text() == before and "no measurements" in capsys.readouterr().err


def test_what_is_refused(tmp_path, page):
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit, match="was not written by"):
        main([str(other), "--page", str(page)])
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="the page needs"):
        main([written(tmp_path, "check"), "--page", str(page)])


def test_the_readme_has_the_marks():
    assert readme_table.replaced(README.read_text(), "text").count("text") >= 1
