"""Parts of benchmarks/samplers.py: exact problems, one adapter a library, measures, the report."""
