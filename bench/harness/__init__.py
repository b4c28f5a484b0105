"""The parts of bench/run: processes, load, scenarios, report. They need only Python's standard library."""
