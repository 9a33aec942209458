"""The systems under study, one package each: planners, and what they do after a failure."""
