"""Benchmarks: ratios measured side by side in one run, one table each. Not shipped in the wheel."""
