"""Record, find, trace, rewrite: the graph passes behind `mhc_compile.transform`."""
