"""One `run(config)` per job: the only place where the layers meet."""
