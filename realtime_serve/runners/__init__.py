"""Model runners: what turns a step's batch into sampled tokens."""
