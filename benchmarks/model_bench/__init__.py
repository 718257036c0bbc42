"""Parts of benchmarks/models.py: one adapter a library, measures, the report."""
