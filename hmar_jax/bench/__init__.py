"""Benchmarks: settings → rows of time, memory and bounds, in JSON and Markdown."""
