"""The planner: memory and time of every pass, from headers alone."""
