"""The processes of a run on several devices: on each a supervisor and a worker, led by the runner."""
