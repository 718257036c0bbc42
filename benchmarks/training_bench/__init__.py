"""Parts of benchmarks/training.py: one adapter a library, the stopwatch, the report."""
