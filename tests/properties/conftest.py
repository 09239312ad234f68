"""Sums what the shards of the property test drew, for the end of the report."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    counts = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "draws" and report.when == "call":
                    counts.update(value)
    if counts:
        parts = ", ".join(f"{counts[k]} {k}" for k in ("rewritten", "refused", "failed"))
        terminalreporter.write_line(f"property tests: {sum(counts.values())} draws: {parts}")
