"""What bench/run is made of: processes, load, scenarios, report. Python's standard library only."""
