"""Who does a run's work: this process, or workers on many hosts."""
